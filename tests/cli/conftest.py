"""Tiny models saved in a folder, and the command line run in it."""

import json
import sys

import pytest

from chai_attention import cli
from chai_attention.cli import progress
from chai_attention.profile import ClusterProfile
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

TEXT = "".join(f"Line {i} of some text, {i * i} and so on.\n" for i in range(100))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Tiny models with a tokenizer, saved as any model is, and some text."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "llama-grouped", "bloom"):
        if family == "bloom":
            from transformers import BloomConfig, BloomForCausalLM

            model = BloomForCausalLM(
                BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=6)
            )
        else:
            model = tiny_model(family)
        model.save_pretrained(root / family)
        tiny_tokenizer().save_pretrained(root / family)
    (root / "text.txt").write_text(TEXT)
    (root / "same.txt").write_text(TEXT)
    (root / "short.txt").write_text("too short")
    (root / "empty.txt").write_text("")
    (root / "rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXT.splitlines()))
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    ClusterProfile((2, 6, 3)).save(root / "counts.json")
    ClusterProfile((2, 2)).save(root / "other.json")
    (root / "bad.json").write_text('{"clusters": [0]}')
    (root / "text.json").write_text("not JSON")
    return root


@pytest.fixture
def chai(folder, monkeypatch, capsys):
    """Run the command line in the folder of models: exit code, output, errors."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(progress, "SECONDS", 3600)  # what is printed must not depend on speed

    monkeypatch.setattr(cli.signal, "signal", lambda *arguments: None)  # this process is pytest

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["chai", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run
