"""``chai eval`` from the command line, with a registry of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval")

from chai_attention.cli import app
from chai_attention.cli.eval import eval_command
from chai_attention.errors import ChaiError
from chai_attention.evaluation import comparators as package
from chai_attention.evaluation.profiled import Profiled
from chai_attention.integrations.vllm.plugin import installed
from chai_attention.profile import ClusterProfile
from eval_methods import OwnCache, Plain, arc_rows, eval_model
from tiny_tokenizer import tiny_tokenizer

MADE = {"mha": Plain, "own": OwnCache}
# what a shell starts in the background ignores Ctrl-C, and so would a command started from there
CATCH = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.fixture
def asked(monkeypatch):
    """A registry of comparators; what it was asked for."""
    calls = []

    def comparators(names, **options):
        calls.append((tuple(names), options))
        made = {"profile": lambda name: Profiled(options["profile"]), **MADE}
        if unknown := set(names) - set(made):
            raise ChaiError(f"no comparator {unknown}: mha, own")
        return {name: made[name](name) for name in names}

    made = types.ModuleType("registry")
    made.comparators = comparators
    made.available = lambda profile, model: (tuple(MADE), ("without other: no library",))
    monkeypatch.setitem(sys.modules, f"{package.__name__}.registry", made)
    monkeypatch.setattr(package, "registry", made, raising=False)
    if not any(command.name == "eval" for command in app.registered_commands):
        app.command("eval")(eval_command)
    return calls


@pytest.fixture
def place(folder, tmp_path):
    """A model that has room for the items, the items, and a text."""
    eval_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps(row) for row in arc_rows(4)]
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "arc_easy.jsonl").write_text("\n".join(lines))
    (tmp_path / "text.txt").write_text("Some text, again and again, to read on. " * 400)
    (tmp_path / "learn.txt").write_text("Other text, over and over, to learn from. " * 400)
    ClusterProfile((2, 6, 3), window=5).save(tmp_path / "profile.json")
    return tmp_path


def options(place, *more):
    fit = ["--calibration-text", place / "learn.txt", "--samples", 4, "--length", 64]
    return [
        "eval", place / "model", "--tasks", "arc_easy,perplexity", "--data", place / "items",
        "--text", place / "text.txt", "--limit", 3, "--out", place / "out", "--device", "cpu",
        *(fit if "--compare" in more and "--calibration-text" not in more else []), *more,
    ]  # fmt: skip


def test_a_profile_is_set_beside_the_model_and_a_second_run_measures_nothing(chai, asked, place):
    arguments = options(place, "--profile", place / "profile.json")
    code, out, err = chai(*arguments)
    assert code == 0
    assert "measured anew" not in err
    table = json.loads((place / "out" / "results.json").read_text())
    assert [row["comparator"] for row in table["rows"]] == ["mha", "profile"]
    assert table["tasks"] == ["arc_easy", "perplexity"]
    row = table["rows"][1]
    assert row["tasks"]["arc_easy"]["items"] == 3
    assert 0.5 < row["kv_share"] < 1
    assert row["tasks"]["perplexity"]["nll_diff"] != 0
    assert "accuracy, %" in out
    assert f"{row['tasks']['arc_easy']['nll']:.4f}" in out
    assert f"{row['kv_share']:.1%}" in out
    assert [names for names, _ in asked] == [("mha", "profile")]
    code, again, err = chai(*arguments)
    assert (code, again, err, len(asked)) == (0, out, "", 1)


def test_jobs_write_the_same_table(chai, asked, place):
    arguments = options(place, "--compare", "own", "--profile", place / "profile.json")
    _, alone, _ = chai(*arguments)
    want = (place / "out" / "results.json").read_bytes()
    shutil.rmtree(place / "out")
    code, out, err = chai(*arguments, "--jobs", 2)
    assert (code, out, err) == (0, alone, "")
    assert (place / "out" / "results.json").read_bytes() == want


def test_comparators_get_text_profile_and_saving(chai, asked, place):
    code, _, err = chai(*options(place, "--compare", "all", "--save", "5%", "--seed", 3))
    assert code == 0
    assert "without other: no library" in err
    ((names, given),) = asked
    assert names == ("mha", "own")
    assert (given["save"], given["seed"], given["profile"]) == (0.05, 3, None)
    assert [tuple(window.shape) for window in given["tokens"]] == [(64,)] * 4
    asked.clear()
    chai(*options(place, "--compare", "own", "--save", "6%", "--seed", 3))
    assert [names for names, _ in asked] == [("own",)]


def test_recall_takes_its_lengths_and_cases_and_python_carries_its_text(chai, asked, place):
    config = place / "model" / "config.json"
    given = json.loads(config.read_text())
    config.write_text(json.dumps({**given, "max_position_embeddings": 1600}))
    arguments = options(place, "--tasks", "recall,arc_easy", "--recall-cases", 2)
    code, out, _ = chai(*arguments, "--recall-lengths", "1k,1500")
    assert code == 0
    assert "recall from 1,500 tokens" in out
    table = json.loads((place / "out" / "results.json").read_text())
    assert table["tasks"] == [
        "arc_easy", "recall-1-1024", "recall-4-1024", "recall-1-1500", "recall-4-1500"
    ]  # fmt: skip
    assert table["rows"][0]["tasks"]["recall-4-1500"]["items"] == 2
    shutil.rmtree(place / "out")
    code, _, _ = chai(*arguments)
    table = json.loads((place / "out" / "results.json").read_text())
    assert table["tasks"] == ["arc_easy", "recall-1-1024", "recall-4-1024"]


def test_a_damaged_file_is_said_and_measured_anew(chai, asked, place):
    chai(*options(place, "--compare", "own"))
    path = place / "out" / "own" / "arc_easy.json"
    before = path.read_bytes()
    path.write_bytes(before[:100])
    code, _, err = chai(*options(place, "--compare", "own"))
    assert code == 0
    assert "measured anew" in err
    assert "damaged" in err
    assert path.read_bytes() == before


def test_mistakes_are_one_line(chai, asked, place):
    shutil.copy(place / "text.txt", place / "copy.txt")
    for more, word in (
        (["--compare", "other"], "no comparator"),
        (["--compare", "profile"], "--profile FILE"),
        (["--tasks", "piqa"], "piqa.jsonl is missing"),
        (["--save", "some", "--compare", "own"], "--save"),
        (["--save", "5%", "--samples", "8"], "--save, --samples fits comparators: name some"),
        (["--calibration-text", place / "copy.txt", "--compare", "own"], "is calibration text"),
        (["--calibration-text", "t.txt"], "--calibration-text fits comparators"),
        (["--recall-cases", "8"], "--recall-cases goes with --tasks recall"),
        (["--tasks", "recall", "--recall-lengths", "1k,some"], "--recall-lengths"),
        (["--tasks", "recall", "--recall-lengths", "1k"], "reads 512 tokens"),
        (["--tasks", "recall"], "too few"),
        (["--calibration-text", place / "none.txt", "--compare", "own"], "none.txt"),
        (["--engine", "other"], "--engine is transformers or vllm"),
        (["--tensor-parallel", "2"], "--tensor-parallel goes with --engine vllm"),
        (["--engine", "vllm", "--jobs", "2"], "leave out --jobs with --engine vllm: vLLM runs one"),
        (["--engine", "vllm"], "leave out --device with --engine vllm"),
    ):
        code, _, err = chai(*options(place, *more))
        assert code == 2
        assert word in err
        assert err.count("\n") == 1


def test_a_table_by_vllm_has_its_own_options(chai, asked, place):
    arguments = [
        "eval", place / "model", "--tasks", "arc_easy", "--data", place / "items", "--engine",
        "vllm", "--out", place / "out",
    ]  # fmt: skip
    lines = [(["--samples", 8, "--length", 9], "leave out --samples, --length with --engine vllm")]
    lines.append((["--device-map", "auto"], "leave out --device-map with --engine vllm"))
    if installed() is None:
        lines.append(([], "vLLM is not installed: pip install"))
    for more, word in lines:
        code, _, err = chai(*arguments, *more)
        assert code == 2
        assert word in err
        assert err.count("\n") == 1


def test_ctrl_c_ends_all_processes_with_130_and_without_a_traceback(place):
    """In the middle of their start, when Python would print where it was."""
    command = [str(part) for part in options(place, "--jobs", "2")]
    chai = subprocess.Popen(
        [sys.executable, "-c", f"{CATCH}; from chai_attention.cli import main; main()", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{chai.pid}/task/{chai.pid}/children")
    spawned = []
    while chai.poll() is None and len(spawned) < 2:
        time.sleep(0.01)
        with contextlib.suppress(OSError):
            spawned = [
                child
                for child in children.read_text().split()
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
            ]
    assert len(spawned) == 2, chai.communicate()
    for receiver in (*map(int, spawned), chai.pid):  # a terminal's comes to all, in any order
        os.kill(receiver, signal.SIGINT)
        time.sleep(0.5)
    _, err = chai.communicate()
    assert (chai.returncode, err) == (130, "")
    assert not any(Path(f"/proc/{child}").exists() for child in spawned)
