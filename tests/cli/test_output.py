"""``--json`` and ``--quiet``: what a program reads, and what a person does not want to see."""

import json
import subprocess
import sys

import pytest

from chai_attention.profile import ClusterProfile
from tiny_models import CONFIGS

PROMISE = {
    "max_loss": 0.01, "rise": 0.0042, "standard_error": 0.001, "windows": 64, "length": 256,
    "saved": 0.187, "saved_per_token": 0.2, "profiles_tried": 7,
}  # fmt: skip
CALIBRATE = (
    "calibrate", "llama", "--text", "text.txt", "--samples", 6, "--length", 24, "--clusters", 3,
    "--recent", 0,
)  # fmt: skip


@pytest.fixture
def promised(folder):
    profile = ClusterProfile(
        (2, 6, 3), promise=PROMISE, provenance={"text": "[red]chats[/] :smile:"}
    )
    profile.save(folder / "promised.json")
    return "promised.json"


def test_inspect_shows_the_promise_and_markup_of_others_as_it_is(chai, promised):
    code, out, err = chai("inspect", promised)
    assert (code, err) == (0, "")
    out = " ".join(out.split())
    assert "perplexity on 64 held-out sequences: +0.42% ±0.10% (asked: at most 1.00%)" in out
    assert "18.7% of the K,V bytes saved at 256 tokens" in out
    assert "calibrated on [red]chats[/] :smile:" in out
    assert "no loss was measured" in chai("inspect", "counts.json")[1]


def test_inspect_shows_how_many_facts_are_still_recalled(chai, folder):
    task = {"facts": 4, "length": 1024, "cases": 48, "full": 40, "clustered": 39}
    recall = {"fall": 0.021, "standard_error": 0.0208, "tasks": [task]}
    promise = PROMISE | {"max_recall_loss": 0.05, "recall": recall}
    ClusterProfile((2, 6, 3), promise=promise).save(folder / "recalls.json")
    out = " ".join(chai("inspect", "recalls.json")[1].split())
    assert (
        "facts recalled in held-out text: 2.1 points fewer ±2.1 (asked: at most 5.0): 39 of 48, "
        "full model 40, with 4 hidden in 1024 tokens"
    ) in out
    promise["recall"] = {"note": "the full model recalls 3 of 48"}
    ClusterProfile((2, 6, 3), promise=promise).save(folder / "recalls.json")
    out = " ".join(chai("inspect", "recalls.json")[1].split())
    assert "facts recalled in held-out text: not measured; the full model recalls 3 of 48" in out


@pytest.mark.parametrize(
    "promise",
    [
        {},
        {"rise": "much"},
        {"windows": None, "max_loss": [1]},
        {"recall": 3},
        {"recall": {"fall": "far", "tasks": [1, {"facts": "two"}]}},
        {"recall": {"fall": 0.1, "tasks": 1}, "max_recall_loss": "little"},
    ],
)
def test_a_promise_of_another_kind_is_shown_as_far_as_it_goes(chai, folder, promise):
    ClusterProfile((2, 6, 3), promise=promise).save(folder / "strange.json")
    code, out, _ = chai("inspect", "strange.json")
    assert code == 0
    assert "unknown" in out


def test_inspect_as_json(chai, promised):
    code, out, err = chai("inspect", promised, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["promise"] == PROMISE
    assert [layer["clusters"] for layer in found["layers"]] == [2, 6, 3]
    assert "kv_bytes_per_token" not in found
    found = json.loads(chai("inspect", promised, "--json", "--model", "llama")[1])
    assert found["kv_bytes_per_token"] == {"full": 576, "clustered": 464}
    assert [layer["kept_k_heads"] for layer in found["layers"]] == [2, 6, 3]


def test_inspect_counts_sliding_windows_once_per_sequence(chai, folder, tmp_path):
    """8 tokens of 6 heads of 8 numbers in layer 0; two other layers grow with every token."""
    CONFIGS["olmo3"]().save_pretrained(tmp_path)
    ClusterProfile((6, 2, 3)).save(tmp_path / "olmo3.json")
    arguments = ("inspect", str(tmp_path / "olmo3.json"), "--model", str(tmp_path))
    code, out, err = chai(*arguments)
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert "0, sliding window" in text
    assert "384 bytes per token, 272 with clusters: 29.2% saved" in text
    assert "layers with sliding windows hold at most 1,536 bytes of a sequence" in text
    found = json.loads(chai(*arguments, "--json")[1])
    assert found["kv_bytes_per_token"] == {"full": 384, "clustered": 272}
    assert found["sliding_window_bytes"] == 1536


def test_inspect_of_a_file_imports_no_torch(folder, promised):
    script = (
        "import sys\n"
        "from chai_attention.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in ([promised], [promised, "--json"], ["llama-7b"]):
        done = subprocess.run(
            [sys.executable, "-c", script, "inspect", *arguments],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_calibrate_as_json_and_quiet(chai, tmp_path):
    code, out, err = chai(*CALIBRATE, "--out", tmp_path / "a.json", "--json")
    assert (code, err) == (0, "")
    assert [layer["clusters"] for layer in json.loads(out)["layers"]] == [3, 3, 3]
    assert chai(*CALIBRATE, "--out", tmp_path / "b.json", "--quiet") == (0, "", "")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_bytes_of_calibrate_and_of_inspect_say_of_how_many_bits(chai, tmp_path):
    """A model in float32, and a server's cache: of 3 layers, 12 vectors of 8 numbers a token."""
    for dtype, bits in (("float32", 32), ("bfloat16", 16)):
        out = (*CALIBRATE, "--out", tmp_path / "a.json", "--dtype", dtype)
        told = json.loads(chai(*out, "--json")[1])
        assert (told["bits_per_number"], told["kv_bytes_per_token"]["full"]) == (bits, 36 * bits)
        assert f"({bits}-bit)" in chai(*out)[1]
    inspect = ("inspect", str(tmp_path / "a.json"), "--model", "llama")
    found = json.loads(chai(*inspect, "--json")[1])
    assert (found["bits_per_number"], found["kv_bytes_per_token"]["full"]) == (16, 36 * 16)
    assert chai(*inspect)[1].count("(16-bit)") == 1


def test_bench_as_json(chai, monkeypatch):
    from chai_attention.benchmarking import ceilings, timing

    monkeypatch.setattr(ceilings, "CPU_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATRIX", 16)
    monkeypatch.setattr(timing, "LEAST_REPEATS", 2)
    code, out, err = chai(
        "bench", "attention", "llama", "--device", "cpu", "--seconds", 0, "--case", "decode:1x9",
        "--clusters", 2, "--dtype", "float32", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert [row["clusters"] for row in json.loads(out)["results"]] == [2]


def test_the_demo_as_json(chai, tmp_path):
    code, out, err = chai(
        "demo", "--model", "llama", "--text", "text.txt", "--max-new-tokens", 4,
        "--out", tmp_path / "demo", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found["runs"]) == set(found["perplexity"]) == {"full model", "CHAI"}


@pytest.mark.parametrize("seed", [2**64, -1])
def test_a_seed_that_torch_cannot_take_is_one_line(chai, seed):
    for command in (
        ("generate", "llama", "--profile", "counts.json", "--prompt", "x"),
        (*CALIBRATE, "--out", "never.json"),
        ("bench", "attention", "llama"),
    ):
        code, _, err = chai(*command, "--seed", seed)
        assert (code, err.count("\n")) == (2, 1)
        assert "--seed" in err


def test_the_largest_seed(chai):
    code, _, err = chai(
        "generate", "llama", "--profile", "counts.json", "--prompt", "x", "--max-new-tokens", 1,
        "--seed", 2**64 - 1,
    )  # fmt: skip
    assert (code, err) == (0, "")
