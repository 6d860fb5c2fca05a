"""``--device-map`` and ``--max-memory`` of every command that loads a model."""

import json

import pytest
import torch

from chai_attention.integrations.transformers import loading

pytest.importorskip("accelerate")
SMALL = 10_000  # bytes that nothing fits
CALIBRATE = (
    "calibrate", "llama", "--text", "text.txt", "--samples", 4, "--held-out", 2, "--length", 40,
    "--save", "10%", "--recent", 8,
)  # fmt: skip
FRONTIER = (
    "frontier", "llama", "--text", "text.txt", "--test", "rows.jsonl", "--budgets", "20",
    "--recipes", "online", "--contexts", "32", "--samples", 8, "--length", 32, "--windows", 2,
)  # fmt: skip
GENERATE = ("generate", "llama", "--profile", "counts.json", "--prompt", "Line", "--json")
REDUNDANCY = ("redundancy", "llama", "--text", "text.txt", "--samples", 2, "--length", 32)
EXPORT = ("export", "llama", "--profile", "counts.json")
BENCH = ("bench", "model", "llama", "--profile", "counts.json", "--case", "1x8", "--seconds", 0)
EVAL = ("eval", "llama", "--tasks", "perplexity", "--text", "text.txt", "--profile", "counts.json")


@pytest.fixture
def parts(tmp_path):
    """A device map of several parts, all on the CPU."""
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys((*names, *(f"model.layers.{layer}" for layer in range(3))), "cpu")
    file = tmp_path / "parts.json"
    file.write_text(json.dumps(places))
    return file


@pytest.fixture
def unloaded(monkeypatch):
    """Weights may not be loaded."""

    def load(*args, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)


def test_calibration_with_a_device_map_is_calibration_without(chai, parts, tmp_path):
    profiles = []
    for name, options in (
        ("a", ()),
        ("b", ("--device-map", parts)),
        ("c", ("--device-map", "auto")),
    ):
        code, _, err = chai(*CALIBRATE, "--out", tmp_path / f"{name}.json", *options)
        assert code == 0, err
        profiles.append((tmp_path / f"{name}.json").read_bytes())
    assert profiles[0] == profiles[1] == profiles[2]


def test_generation_export_and_redundancy_with_a_device_map(chai, parts, tmp_path):
    memory = ("--device-map", "auto", "--max-memory", "cpu=1GiB")
    with_map = ("--device-map", parts)
    texts = []
    for options in ((), memory, with_map):
        code, out, err = chai(*GENERATE, "--max-new-tokens", 5, *options)
        assert code == 0, err
        texts.append(json.loads(out)["runs"]["CHAI"]["text"])
    assert texts[0] == texts[1] == texts[2]
    assert chai(*EXPORT, "--out", tmp_path / "exported", *with_map)[0] == 0
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert chai(*REDUNDANCY, "--out", tmp_path / "redundancy", *memory)[0] == 0
    code, out, err = chai(*BENCH, "--json", "--new-tokens", 1, *with_map)
    assert code == 0, err
    assert json.loads(out)["devices"] == ["cpu"]


def test_evaluation_and_frontier_with_a_device_map(chai, parts, tmp_path):
    code, _, err = chai(*EVAL, "--out", tmp_path / "eval", "--device-map", parts)
    assert code == 0, err
    code, _, err = chai(*FRONTIER, "--out", tmp_path / "frontier", "--device-map", "balanced")
    assert code == 0, err


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    "command", [CALIBRATE, FRONTIER, GENERATE, REDUNDANCY, EXPORT, EVAL], ids=lambda c: c[0]
)
def test_what_does_not_fit_is_one_line_that_names_the_option(chai, command, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "available", lambda device: SMALL)
    out = () if command is GENERATE else ("--out", tmp_path / "out")
    code, text, err = chai(*command, *out, "--quiet", "--device" if command is not EXPORT else
                           "--dtype", "cpu" if command is not EXPORT else "float32")  # fmt: skip
    assert (code, text) == (2, "")
    assert err.count("\n") == 1
    assert "llama needs about" in err
    assert "--device-map auto divides it" in err


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-memory", "cpu=1GB"), "give --device-map auto"),
        (("--device-map", "nothing.json"), "nothing.json: No such file"),
        (("--device-map", "text.json"), "text.json is no device map"),
        (("--device-map", "auto", "--max-memory", "cpu=1"), "'1' is no size"),
        (("--device-map", "auto", "--max-memory", "cpu=9kB"), "do not fit --max-memory"),
        (("--device-map", "auto", "--device", "cpu"), "leave out --device"),
    ],
)
def test_mistakes_are_one_line(chai, options, message):
    for command in (GENERATE, BENCH):
        code, text, err = chai(*command, *options)
        assert (code, text) == (2, "")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.usefixtures("unloaded")
def test_processes_side_by_side_have_no_device_map(chai, tmp_path):
    code, _, err = chai(*EVAL, "--out", tmp_path / "e", "--jobs", 2, "--device-map", "auto")
    assert code == 2
    assert "leave one of them out" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_preset_of_random_weights_is_divided(chai):
    options = ("--layers", 1, "--case", "1x8", "--seconds", 0, "--new-tokens", 1, "--json")
    code, out, err = chai("bench", "model", "llama-7b", *options, "--device-map", "auto",
                          "--max-memory", "cpu=1GB")  # fmt: skip
    assert (code, out) == (2, "")
    assert "1.9 GB of weights do not fit --max-memory" in err


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("command", [GENERATE, EXPORT, BENCH, EVAL], ids=lambda command: command[0])
def test_a_profile_of_another_model_is_refused_before_the_model_is_loaded(chai, command, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"clusters": [2, 6, 3, 6]}')
    arguments = [other if argument == "counts.json" else argument for argument in command]
    if command[0] in ("export", "eval"):
        arguments += ["--out", tmp_path / "out"]
    code, _, err = chai(*arguments)
    assert code != 0
    assert "4 layers in the profile, 3 in the model" in err
