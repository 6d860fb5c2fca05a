"""``chai export`` as a person runs it, mistakes included."""

import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from chai_attention.integrations.transformers import enabled
from chai_attention.profile import ClusterProfile

PROFILE = ClusterProfile((2, 6, 3), refit={"kind": "output"})


@torch.no_grad()
def test_a_refit_is_in_the_exported_weights(chai, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    weight = model.model.layers[0].self_attn.o_proj.weight * 1.5
    profile = replace(PROFILE, corrections={"layers.0.weight": weight})
    profile.save(tmp_path / "p.json")
    with enabled(model, profile):
        want = model(torch.arange(3, 60)[None]).logits
    out = tmp_path / "new" / "out"
    code, text, _ = chai("export", "llama", "--profile", tmp_path / "p.json", "--out", out)
    assert code == 0
    assert "chai_profile.json" in text
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    with enabled(again, out):
        torch.testing.assert_close(again(torch.arange(3, 60)[None]).logits, want)
    code, text, _ = chai("generate", out, "--profile", out, "--prompt", "Hi", "--max-new-tokens", 2)
    assert code == 0


def test_the_dtype_stays_what_it_was(chai, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    for file in (folder / "llama").glob("tokenizer*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    for options, want in ([], "bfloat16"), (["--dtype", "float32"], "float32"):
        out = tmp_path / want
        code, *_ = chai(
            "export", tmp_path / "half", "--profile", "counts.json", "--out", out, *options
        )
        assert code == 0
        assert json.loads((out / "config.json").read_text())["dtype"] == want


def test_a_link_to_an_empty_folder_and_its_mode_stay(chai, tmp_path):
    (tmp_path / "place").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("place")
    arguments = ("export", "llama", "--profile", "counts.json", "--out")
    assert chai(*arguments, tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "place" / "chai_profile.json").exists()
    assert stat.S_IMODE((tmp_path / "place").stat().st_mode) == 0o700
    before = os.umask(0o027)
    try:
        assert chai(*arguments, tmp_path / "new")[0] == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
    assert sorted(os.listdir(tmp_path)) == ["link", "new", "place"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama", "--profile", "counts.json", "--out", "llama"], "not an empty folder"),
        (["llama", "--profile", "counts.json", "--out", "text.txt"], "not an empty folder"),
        (["llama", "--profile", "other.json", "--out", "new"], "2 layers in the profile"),
        (["llama", "--profile", "none.json", "--out", "new"], "no profile 'none.json'"),
        (["nowhere/x", "--profile", "counts.json", "--out", "new"], "no model 'nowhere/x'"),
        (["llama", "--profile", "counts.json"], "--out"),
        (["llama", "--profile", "counts.json", "--out", "new", "--dtype", "int8"], "dtype is one"),
    ],
)
def test_mistakes_are_one_line(chai, folder, arguments, message):
    code, _, err = chai("export", *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert message in err
    assert not (folder / "new").exists()


def test_a_refit_of_another_model_is_one_line(chai, folder, tmp_path):
    profile = replace(PROFILE, corrections={"layers.0.weight": torch.zeros(64, 64)})
    profile.save(tmp_path / "p.json")
    for command in (
        ["export", "llama", "--profile", tmp_path / "p.json", "--out", tmp_path / "out"],
        ["inspect", tmp_path / "p.json", "--model", "llama"],
    ):
        code, _, err = chai(*command)
        assert code == 2
        assert err.count("\n") == 1
        assert "made for another model" in err
    assert not (tmp_path / "out").exists()
