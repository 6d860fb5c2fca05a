"""Measurements run without dropout, and leave every module in the mode it was in."""

import pytest

from chai_attention.integrations.transformers.modes import evaluating
from tiny_models import tiny_model


def test_every_module_comes_back_in_its_own_mode():
    model = tiny_model("gpt2").train()
    frozen = model.transformer.h[1].eval()

    def measure():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        measure()
    assert model.training
    assert model.transformer.h[0].attn.training
    assert not any(module.training for module in frozen.modules())
