"""Switching on and off: nothing stays behind, two models side by side, clear refusals."""

import gc

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from chai_attention.errors import CacheError, ProfileError, UnsupportedModelError
from chai_attention.integrations.transformers import disable, enable, enabled
from chai_attention.integrations.transformers.timed_generation import PromptError, write
from chai_attention.profile import ClusterProfile
from tiny_models import tiny_model

PROFILE = ClusterProfile(clusters=(2, 6, 3), window=8)


def ids(length=20):
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_other_model():
    """Models that earlier tests left enabled hold the name until they are collected."""
    gc.collect()


def registered():
    return ("chai" in AttentionInterface()) or ("chai" in AttentionMaskInterface())


@torch.no_grad()
def test_disable_restores_everything():
    model = tiny_model("llama")
    before = model(ids()).logits
    attributes = [set(vars(m)) for m in model.modules()]
    enable(model, PROFILE)
    assert registered()
    assert not torch.equal(model(ids()).logits, before)
    disable(model)
    assert not registered()
    assert torch.equal(model(ids()).logits, before)
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert all(not m._forward_pre_hooks for m in model.modules())
    disable(model)  # nothing to do


def test_the_block_ends_even_on_an_error():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="inside"), enabled(model, PROFILE):
        raise RuntimeError("inside")
    assert not registered()


@torch.no_grad()
def test_blocks_nest():
    model = tiny_model("llama")
    inner = ClusterProfile(clusters=(1, 1, 1), window=4)
    with enabled(model, PROFILE):
        outer = model(ids()).logits
        with enabled(model, inner):
            assert not torch.equal(model(ids()).logits, outer)
        assert torch.equal(model(ids()).logits, outer)


@torch.no_grad()
def test_two_models_with_different_profiles():
    one, two = tiny_model("llama"), tiny_model("llama")
    other = ClusterProfile(clusters=(1, 1, 1), window=4)
    with enabled(one, PROFILE):
        want_one = one(ids()).logits
    with enabled(two, other):
        want_two = two(ids()).logits
    enable(one, PROFILE)
    enable(two, other)
    assert torch.equal(one(ids()).logits, want_one)
    assert torch.equal(two(ids()).logits, want_two)
    disable(one)
    assert torch.equal(two(ids()).logits, want_two)


def test_a_collected_model_leaves_nothing_registered():
    model = tiny_model("llama")
    enable(model, PROFILE)
    del model
    gc.collect()
    assert not registered()


@torch.no_grad()
def test_the_decoder_alone_works_too():
    model = tiny_model("llama")
    with enabled(model, PROFILE):
        cache = model.model(ids(), use_cache=True).past_key_values
        last = model.model(ids(1), past_key_values=cache).last_hidden_state
    assert last.shape == (1, 1, 48)


def test_profile_of_another_model_is_refused():
    with pytest.raises(ProfileError):
        enable(tiny_model("llama"), "llama-7b")


def test_double_precision_is_refused():
    with pytest.raises(UnsupportedModelError, match="float64"):
        enable(tiny_model("llama").double(), PROFILE)


@torch.no_grad()
def test_unsupported_features_are_refused():
    model = tiny_model("llama")
    with enabled(model, PROFILE):
        with pytest.raises(UnsupportedModelError, match="output_attentions"):
            model(ids(), output_attentions=True)
        mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
        with pytest.raises(UnsupportedModelError, match="2D attention_mask"):
            model(ids(), attention_mask=mask)
        cache = model(ids(), use_cache=True).past_key_values
        with pytest.raises(CacheError, match="covers 3 tokens"):
            model(ids(1), past_key_values=cache, attention_mask=torch.tensor([[0, 1, 1]]))


def test_training_with_dropout_is_refused():
    model = tiny_model("gpt2")
    with enabled(model, PROFILE):
        model.train()
        with pytest.raises(UnsupportedModelError, match="inference"):
            model(ids())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_float32(dtype):
    model = tiny_model("llama")
    profile = ClusterProfile(
        clusters=(2, 2, 2),
        membership="static",
        representatives=((0, 0, 0, 3, 3, 3),) * 3,
    )
    with enabled(model, profile):
        want = model(ids()).logits
    plain = model(ids()).logits
    model = model.to(dtype)
    loss = (model(ids()).logits.float() - plain).abs().max()
    with enabled(model, profile):
        got = model(ids()).logits.float()
    assert (got - want).abs().max() < 2 * loss + 0.02 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "profile",
    [
        PROFILE,
        ClusterProfile(
            (3,) * 3, "blend", 4, blend=0.5, features="value", costs=torch.rand(3, 6, 6).tolist()
        ),
    ],
    ids=["maps", "blend"],
)
def test_weights_that_are_no_numbers_are_an_error_of_ours(profile):
    """Clustering NaN ended in an IndexError."""
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj.weight[0] = torch.nan
    with (
        enabled(model, profile),
        pytest.raises(UnsupportedModelError, match=r"layer [12] are not finite"),
    ):
        model(ids())


def test_a_prompt_of_another_models_tokenizer_is_refused():
    model = tiny_model("llama")
    with pytest.raises(PromptError, match=r"token id 97, and this model embeds ids 0 to 96"):
        write(model, None, torch.tensor([[3, 97]]), max_new_tokens=1)
