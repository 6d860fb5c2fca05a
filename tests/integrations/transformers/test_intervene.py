"""Captured, replaced and edited attention: what is seen, what changes, what is refused."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.intervene import (
    capture,
    edited_heads,
    replaced_attention,
)
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
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


def ids():
    return torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))


def nothing(*args):
    pass


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_results_do_not_change_and_every_layer_is_seen(family):
    model = tiny_model(family)
    # torch's fused attention has no softcap: gemma2 is compared with its own eager code
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    want = model(ids()).logits
    shape = describe(model)
    seen = []

    def look(call, out):
        seen.append(call.layer)
        assert call.query.shape == (2, shape.heads, 20, shape.head_dim)
        assert call.key.shape == call.value.shape == (2, shape.kv_heads, 20, shape.head_dim)
        assert out.shape == (2, 20, shape.heads, shape.head_dim)
        assert call.softcap == (3.0 if family == "gemma2" else None)
        assert call.scale == pytest.approx(20**-0.5 if family == "gemma2" else call.scale)

    with capture(model, look):
        got = model(ids()).logits
    assert seen == [0, 1, 2]
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_everything_is_restored_even_on_an_error(before):
    model = tiny_model("llama")
    model.set_attn_implementation(before)
    names = set(AttentionInterface()), set(AttentionMaskInterface())
    attributes = [set(vars(m)) for m in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), capture(model, nothing):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before
    assert (set(AttentionInterface()), set(AttentionMaskInterface())) == names
    assert [set(vars(m)) for m in model.modules()] == attributes


@torch.no_grad()
def test_two_models_can_be_looked_at_together():
    one, two = tiny_model("llama"), tiny_model("gpt2")
    seen = []
    with capture(one, lambda call, _: seen.append(("one", call.layer))):
        with capture(two, lambda call, _: seen.append(("two", call.layer))):
            two(ids())
            one(ids())
        one(ids())
    assert seen == [("two", i) for i in range(3)] + [("one", i) for i in range(3)] * 2


def test_a_model_with_clustered_heads_is_refused():
    model = tiny_model("llama")
    with (
        enabled(model, ClusterProfile((2, 2, 2))),
        pytest.raises(UnsupportedModelError, match="disable"),
        capture(model, nothing),
    ):
        pass
