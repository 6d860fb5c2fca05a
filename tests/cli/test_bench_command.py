"""``chai bench`` as a person runs it, on tiny shapes."""

import importlib.util
import json
import re

import pytest

from chai_attention.benchmarking import ceilings, clustered, runners, timing
from chai_attention.integrations.transformers import layer as layer_module

ATTENTION = ("bench", "attention", "--device", "cpu", "--seconds", 0)
MODEL = ("bench", "model", "--device", "cpu", "--seconds", 0, "--new-tokens", 2)
ROW = {
    "kind", "batch", "tokens", "dtype", "clusters", "kept_keys", "kept_values", "streaming",
    "us", "iqr_us", "repeats", "bytes", "flops", "ideal_us", "of_ideal", "baseline", "baseline_us",
    "speedup", "ideal_speedup", "error", "allowed_error",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATRIX", 16)
    monkeypatch.setattr(timing, "LEAST_REPEATS", 2)
    monkeypatch.setattr(runners, "LEAST_PROMPTS", 1)


def test_attention_writes_table_json_and_plot(chai, tmp_path):
    out, plot = tmp_path / "a.json", tmp_path / "a.png"
    code, text, error = chai(
        *ATTENTION, "llama-grouped", "--case", "decode:2x33", "--case", "prefill:1x9",
        "--clusters", "2,all", "--dtype", "float32", "--out", out, "--plot", plot,
    )  # fmt: skip
    assert (code, error) == (0, "")
    assert "llama-grouped: 6 heads x 8, 2 K/V heads" in text
    for words in ("decode 2 x 33", "prefill 1 x 9", "SDPA math", "unfused", "Ceilings measured"):
        assert words in " ".join(text.split())  # lines are wrapped
    data = json.loads(out.read_text())
    assert set(data) == {
        "checksum", "schema_version", "benchmark", "shape", "layout", "machine", "ceilings",
        "drift", "results", "baselines",
    }  # fmt: skip
    assert len(data["results"]) == 4
    assert all(set(row) == ROW for row in data["results"])
    assert {"device", "torch", "processor", "threads"} <= set(data["machine"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_broken_implementation_gives_an_error_and_no_figures(chai, tmp_path, monkeypatch):
    right = clustered.attention

    def wrong(query, *args, **options):
        out, lse = right(query, *args, **options)
        return (out * 1.5 if query.shape[2] > 1 else out), lse

    monkeypatch.setattr(clustered, "attention", wrong)
    out, plot = tmp_path / "a.json", tmp_path / "a.png"
    code, text, error = chai(
        *ATTENTION, "llama", "--case", "decode:1x9", "--case", "prefill:1x9",
        "--clusters", 2, "--out", out, "--plot", plot,
    )  # fmt: skip
    assert (code, text) == (2, "")
    assert "wrong: off by" in error
    assert "nothing is reported" in error
    assert not out.exists()
    assert not plot.exists()


def test_profiles_give_clusters_and_windows(chai, tmp_path, folder):
    (folder / "window.json").write_text(
        '{"clusters": [2, 3, 2], "recent": 4, "sinks": 1, '
        '"model": {"heads": 6, "kv_heads": 6, "head_dim": 8, "layers": 3}}'
    )
    out = tmp_path / "a.json"
    arguments = ("--case", "decode:1x20", "--dtype", "float32", "--out", out)
    code, text, _ = chai(*ATTENTION, "--profile", "window.json", *arguments)
    assert code == 0
    assert "exact 4+1" in text
    data = json.loads(out.read_text())
    assert [row["clusters"] for row in data["results"]] == [2, 3]
    code, _, _ = chai(*ATTENTION, "--profile", "window.json", *arguments, "--recent", 0)
    assert code == 0
    assert json.loads(out.read_text())["layout"] == "dense"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "decode"), "--case is decode:BATCHxTOKENS"),
        (("--clusters", "7"), "--clusters is numbers from 1 to 6"),
        (("--dtype", "int8"), "--dtype is of float32"),
        (("--recent", "x"), "--recent is RECENT+SINKS"),
        (("--paged", 16), "--paged needs CUDA"),
        (("--cache-dtype", "fp8"), "--cache-dtype needs --paged"),
        (("--paged", 0), "paged"),
        (("--profile", "other.json"), "2 layers in the profile, 3 in the model"),
        (("--profile", "none.json"), "no profile 'none.json'"),
        (("--out", "missing/a.json"), "no folder missing"),
        (("--out", "."), "it is a folder"),
    ],
)
def test_attention_refuses_before_it_measures(chai, arguments, message):
    code, text, error = chai(*ATTENTION, "llama", *arguments)
    assert (code, text) == (2, "")
    assert message in error
    assert error.count("\n") == 1


def test_unknown_models_and_devices(chai):
    assert "no model 'nothing'" in chai(*ATTENTION, "nothing")[2]
    assert "not 'tpu'" in chai("bench", "attention", "--device", "tpu")[2]
    assert "does not say heads" in chai(*ATTENTION, "--profile", "counts.json")[2]


def test_plots_need_matplotlib(chai, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    code, text, error = chai(*ATTENTION, "llama", "--plot", tmp_path / "a.png")
    assert (code, text) == (2, "")
    assert "chai-attention[plots]" in error


def test_model_writes_table_json_and_plot(chai, tmp_path):
    out, plot = tmp_path / "m.json", tmp_path / "m.png"
    code, text, error = chai(
        *MODEL, "llama", "--profile", "counts.json", "--case", "1x40", "--case", "2x20",
        "--out", out, "--plot", plot,
    )  # fmt: skip
    assert (code, error) == (0, "")
    assert "llama: 3 layers, 6 heads x 8, float32; counts.json" in text
    for words in ("1 x 40", "2 x 20", "unfused", "fused", "CHAI", "Ceilings measured"):
        assert words in " ".join(text.split())  # lines are wrapped
    data = json.loads(out.read_text())
    assert [row["run"] for row in data["results"]] == ["unfused", "fused", "k = H", "CHAI"] * 2
    assert len(data["checks"]) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_model_with_wrong_logits_gives_no_figures(chai, tmp_path, monkeypatch):
    right = layer_module.attention

    def wrong(*args, **options):
        out, lse = right(*args, **options)
        return -out, lse

    monkeypatch.setattr(layer_module, "attention", wrong)
    out = tmp_path / "m.json"
    arguments = ("llama", "--profile", "counts.json", "--case", "1x40", "--out", out)
    code, text, error = chai(*MODEL, *arguments)
    assert (code, text) == (2, "")
    assert "wrong logits" in error
    assert not out.exists()


def test_some_layers_with_random_weights(chai):
    code, text, _ = chai(
        *MODEL, "llama", "--profile", "counts.json", "--layers", 1, "--case", "1x20"
    )
    assert code == 0
    assert "llama, 1 of 3 layers" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama",), "no schedule is published for llama"),
        (("opt-66b",), "no schedule is published for opt-66b"),
        (("llama", "--profile", "other.json"), "2 layers in the profile"),
        (("llama", "--profile", "counts.json", "--layers", 9), "--layers 9 is more than the 3"),
        (("llama", "--profile", "counts.json", "--case", "1x1"), "--case is BATCHxTOKENS"),
        (("llama", "--profile", "counts.json", "--case", "1x300"), "reads at most 256 tokens"),
        (("llama", "--profile", "counts.json", "--dtype", "int8"), "dtype is one of"),
    ],
)
def test_model_refuses(chai, arguments, message):
    code, text, error = chai(*MODEL, *arguments)
    assert (code, text) == (2, "")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: the weights need 27.0 GB in float32, 16.0 are free: use --layers"),
        (("--layers", 1, "--case", "99999999x8"), "K and V of 99999999x8 need"),
        (("--layers", 1, "--case", "1x99999999"), "K and V of 1x99999999 need"),
        (("llama", "--profile", "counts.json", "--case", "9999999x64"), "use a smaller case"),
    ],
)
def test_what_does_not_fit_is_told_before_a_model_is_built(chai, monkeypatch, arguments, message):
    from chai_attention.benchmarking import model
    from chai_attention.integrations.transformers import loading

    def build(*arguments, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr(model, "random_model", build)
    monkeypatch.setattr(loading, "load_model", build)
    monkeypatch.setattr(model, "available", lambda device: 16 * 10**9)
    code, out, err = chai("bench", "model", "--device", "cpu", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_two_revisions_in_one_run(chai, tmp_path, monkeypatch):
    from chai_attention.benchmarking import revisions

    root, commit = revisions.resolve_revision("HEAD")
    arguments = [
        *ATTENTION, "llama-grouped", "--case", "decode:1x33", "--clusters", 2, "--dtype", "float32",
        "--out", tmp_path / "a.json", "--base", "HEAD",
    ]  # fmt: skip
    code, text, error = chai(*arguments)
    assert (code, error) == (0, "")
    words = " ".join(text.split())
    assert f"Revision {commit[:12]} beside this code" in words
    assert re.search(r"decode 1 x 33 float32, 2 clusters \S+ \S+ \S+ \S+ \d+\.\d\dx", words)
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["base"]["revision"] == commit
    assert data["base"]["results"][0]["us"] > 0
    assert str(tmp_path) not in revisions._git(root, "worktree", "list", of="")
    code, _, error = chai(*arguments[:-1], "no-such-branch")
    assert code == 2
    assert error.startswith("error: there is no revision 'no-such-branch'")
    assert error.count("\n") == 1


def test_the_other_revision_gets_the_same_case_and_no_outputs_of_ours():
    from chai_attention.benchmarking.revisions import _without

    given = ["bench", "model", "x", "--base", "HEAD", "--case", "1x9", "--out=a", "--plot", "b"]
    assert _without([*given, "--json"]) == ["bench", "model", "x", "--case", "1x9", "--quiet"]
