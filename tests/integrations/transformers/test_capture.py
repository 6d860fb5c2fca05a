"""Looking at queries and keys while the model runs: nothing changes, nothing stays."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.capture import capture
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from tiny_models import CONFIGS, tiny_model


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
