import math

import pytest
import torch

from chai_attention.calibration.perplexity import Loss, paired_rise, token_loss
from tiny_models import tiny_model


def test_loss_is_the_model_s_own():
    model = tiny_model("llama")
    windows = torch.randint(3, 97, (5, 17))
    got = token_loss(model, windows, batch_size=2)
    with torch.no_grad():
        want = [model(w[None], labels=w[None]).loss.item() for w in windows]
    assert got.per_sequence == pytest.approx(want, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(sum(want) / 5), rel=1e-5)


def test_paired_rise_cancels_what_windows_share():
    baseline = Loss((1.0, 5.0, 3.0))
    rise = paired_rise(baseline, Loss((1.1, 5.1, 3.1)))
    assert rise.rise == pytest.approx(math.exp(0.1) - 1, rel=1e-5)
    assert rise.standard_error == pytest.approx(0, abs=1e-6)
    assert str(rise) == "+10.52% ±0.00%"


def test_bad_windows_are_refused():
    with pytest.raises(ValueError, match="two or more tokens"):
        token_loss(tiny_model("llama"), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="same sequences"):
        paired_rise(Loss((1.0,)), Loss((1.0, 2.0)))


def test_a_model_in_training_is_scored_without_dropout_and_left_in_training():
    model = tiny_model("gpt2")
    windows = torch.randint(3, 97, (4, 17))
    want = token_loss(model, windows)
    model.train()
    frozen = model.transformer.h[0].eval()
    assert token_loss(model, windows) == want
    assert model.training
    assert not frozen.training


def test_a_loss_too_large_for_a_float_is_infinite_not_an_error():
    assert Loss((800.0,)).perplexity == math.inf
    assert paired_rise(Loss((1.0, 1.0)), Loss((900.0, 901.0))).rise == math.inf
    assert not Loss((1.0, math.nan)).finite
