"""Replaced attention and edited heads: what they see, what they change, what they refuse."""

import pytest
import torch

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.intervene import edited_heads, replaced_attention
from chai_attention.profile import ClusterProfile
from comparator_cases import batch, logits, traces
from tiny_models import CONFIGS, tiny_model


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_models_own_attention_is_left_bit_for_bit(family):
    model = tiny_model(family)
    wanted, before = logits(model, batch()), traces(model)
    layers = []
    with replaced_attention(model, lambda call: layers.append(call.layer) or call.plain()):
        found = logits(model, batch())
    # families with softcaps run them outside torch's fused attention
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert layers == [0, 1, 2]
    seen = {}
    with edited_heads(
        model,
        lambda layer, out: seen.setdefault(layer, out) * 1.0,
        lambda layer, hidden: layers.append(hidden.shape),
    ):
        assert torch.equal(logits(model, batch()), wanted)
    assert layers[3:] == [(3, 21, 48)] * 3
    assert [seen[layer].shape[:3] for layer in range(3)] == [(3, 21, 6)] * 3
    assert traces(model) == before


@pytest.mark.parametrize("family", ["llama-grouped", "opt", "gpt2"])
def test_a_head_that_is_zeroed_attends_to_nothing(family):
    """Both seams agree: zeros from attention, zeros before the output projection."""
    model = tiny_model(family)

    def zeroed(out):
        out = out.clone()
        out[:, :, 2] = 0
        return out

    with replaced_attention(model, lambda call: zeroed(call.plain())):
        first = logits(model, batch())
    with edited_heads(model, lambda layer, out: zeroed(out)):
        second = logits(model, batch())
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    with edited_heads(model, lambda layer, out: None):
        assert torch.equal(logits(model, batch()), logits(model, batch()))


def test_enabled_models_are_refused():
    model = tiny_model("llama")
    with enabled(model, ClusterProfile((2, 2, 2))):
        before = traces(model)
        with (
            pytest.raises(UnsupportedModelError, match="disable"),
            edited_heads(model, lambda layer, out: out),
        ):
            pass
        with (
            pytest.raises(UnsupportedModelError, match="disable"),
            replaced_attention(model, lambda call: call.plain()),
        ):
            pass
        assert traces(model) == before
