"""Texts that are too long for a model, or for the memory, are refused before it is loaded."""

import pytest
from transformers import LlamaConfig

from chai_attention.calibration.settings import Settings
from chai_attention.calibration.work import reading_work, work_of
from chai_attention.integrations.transformers import loading

CALIBRATE = ("calibrate", "llama", "--out", "p.json", "--text", "text.txt")
FRONTIER = ("frontier", "llama", "--text", "text.txt", "--test", "short.txt", "--out", "f")
REDUNDANCY = ("redundancy", "llama", "--text", "text.txt", "--out", "r")
EVAL = ("eval", "llama", "--text", "text.txt", "--out", "e")


@pytest.fixture
def never_loaded(monkeypatch):
    """Loading weights would be a failure of the test."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ((*CALIBRATE, "--length", "32768"), "length must be at least 2 and at most 256"),
        ((*FRONTIER, "--length", "300"), "length must be at least 2 and at most 256"),
        ((*FRONTIER, "--contexts", "100,32768"), "length must be at least 2 and at most 256"),
        ((*REDUNDANCY, "--length", "257"), "length must be at least 2 and at most 256"),
        ((*EVAL, "--tasks", "perplexity-32768"), "the model reads at most 256"),
        ((*EVAL, "--tasks", "recall", "--recall-lengths", "32k"), "this model reads 256 tokens"),
        ((*EVAL, "--tasks", "perplexity", "--compare", "share", "--length", "999"), "at most 256"),
    ],
)
def test_what_a_model_cannot_read(chai, never_loaded, command, told):
    if "eval" in command:
        pytest.importorskip("lm_eval")
    code, out, err = chai(*command)
    assert code == 2
    assert out == ""
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        (*CALIBRATE, "--length", "200"),
        (*FRONTIER, "--contexts", "200"),
        (*REDUNDANCY, "--length", "200"),
        (*EVAL, "--tasks", "perplexity-200"),
    ],
)
def test_what_does_not_fit_the_memory(chai, never_loaded, monkeypatch, command):
    if "eval" in command:
        pytest.importorskip("lm_eval")
    monkeypatch.setattr(loading, "available", lambda device: 2_000_000)
    code, out, err = chai(*command)
    assert code == 2
    assert out == ""
    assert "llama needs about" in err
    assert "for the work" in err
    assert len(err.splitlines()) == 1


def test_long_windows_of_a_7b_model_fit_one_card_of_80_gb():
    """What is reckoned for 32k tokens, beside 13.5 GB of weights."""
    import torch

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=131_072,
    )  # fmt: skip

    def gigabytes(work):
        return work(config).bytes(config, torch.bfloat16) / 1e9

    calibrated = gigabytes(work_of(Settings(), 32_768))
    assert 25 < calibrated < 40
    assert gigabytes(work_of(Settings(), 16_384)) <= calibrated  # more windows at once
    assert 10 < gigabytes(reading_work([32_768], 16)) < 15
    assert 15 < gigabytes(reading_work([32_768], 4, 32_768)) < 20
    assert gigabytes(work_of(Settings(), 131_072)) > 80  # refused
