"""torch.autocast, for all forwards or for some, and Q, K and V of different dtypes."""

import pytest
import torch

from chai_attention.errors import CacheError, UnsupportedModelError
from chai_attention.integrations.transformers import (
    ClusteredCache,
    DecodeGraph,
    StaticClusteredCache,
    enable,
    enabled,
)
from chai_attention.profile import ClusterProfile
from recorded_graph import played
from tiny_models import tiny_model

REP = ((0, 0, 4, 4, 4, 0), (0, 1, 2, 3, 4, 5), (3, 1, 1, 3, 3, 5))
RECENT = {"recent": 5, "sinks": 3}
PROFILES = {
    "every-head": ClusterProfile((6, 6, 6)),
    "static": ClusterProfile((2, 6, 3), "static", representatives=REP),
    "static-recent": ClusterProfile((2, 6, 3), "static", representatives=REP, **RECENT),
    "online-recent": ClusterProfile((2, 6, 3), window=6, **RECENT),
}
LOW = [torch.bfloat16, torch.float16]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def prompt(length, batch=2, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def region(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def made(model, profile, static, room=60):
    return StaticClusteredCache(model, profile, room) if static else ClusteredCache(model, profile)


def steps(model, cache, ids, cuts, dtypes):
    parts = []
    for part, dtype in zip(ids.split(cuts, 1), dtypes, strict=True):
        with region(dtype):
            parts.append(model(part, past_key_values=cache).logits.float())
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_autocast_is_as_close_to_float32_as_the_plain_model(profile, dtype, static):
    """Q and K arrive in float32, rotated, and V in the narrow dtype."""
    model = tiny_model("llama")
    ids = prompt(30)
    plain = model(ids).logits
    with region(dtype):
        loss = (model(ids).logits.float() - plain).abs().max()
    with enabled(model, profile):
        want = model(ids, use_cache=False).logits
        cache = made(model, profile, static)
        got = steps(model, cache, ids, [20, 1, 9], [dtype] * 3)
        assert cache.layers[0].tensors()["key"].dtype == dtype
    close = (got - want).abs().max() < 2 * loss + 0.02 * want.abs().max()
    # in low precision an online membership may be another one
    assert close or profile.membership == "online"
    assert got.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "phi", "opt"])
def test_generate_under_autocast(family):
    model = tiny_model(family)
    grouped = family in ("gemma2", "qwen3")
    ids = prompt(20)
    options = {"attention_mask": torch.ones_like(ids), **GREEDY}
    with region(torch.bfloat16):
        plain = model.generate(ids, **options)
        enable(model, ClusterProfile((6, 6, 6)))
        got = model.generate(ids, **options)
        enable(model, ClusterProfile((6, 3, 3) if grouped else (2, 6, 3), window=6))
        assert model.generate(ids, **options).shape == got.shape
    # the same numbers in another order: most tokens are the same, the first ones are
    assert torch.equal(got[:, :22], plain[:, :22])


@torch.no_grad()
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
def test_autocast_for_some_forwards_loses_nothing_of_the_others(profile, static):
    """float32 K and V of a prompt stay float32, as they do in transformers' cache."""
    model = tiny_model("llama")
    enable(model, profile)
    ids = prompt(30)
    want = model(ids, use_cache=False).logits
    cache = made(model, profile, static)
    dtypes = [None, torch.bfloat16, torch.bfloat16, None]
    got = steps(model, cache, ids, [25, 1, 3, 1], dtypes)
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    assert cache.layers[0].tensors()["value"].dtype == torch.float32
    torch.testing.assert_close(got[:, :25], want[:, :25], atol=1e-5, rtol=1e-5)
    if profile.membership == "online":
        return
    cache = made(model, profile, static)
    dtypes = [torch.bfloat16, torch.bfloat16, None, torch.float16]
    if static:
        with pytest.raises(CacheError, match=r"holds torch\.bfloat16, and this forward runs in"):
            steps(model, cache, ids, [4, 1, 1, 24], dtypes)
        return
    got = steps(model, cache, ids, [4, 1, 1, 24], dtypes)
    assert (got - want).abs().max() < 0.05 * want.abs().max()


@torch.no_grad()
def test_q_k_and_v_of_different_dtypes_are_refused_as_torch_refuses_them():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.to(torch.bfloat16)
        layer.self_attn.v_proj.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    with enabled(model, PROFILES["static"]):
        for cache in ({"use_cache": False}, {"use_cache": True}):
            with pytest.raises(UnsupportedModelError, match=r"V in torch\.bfloat16: load the"):
                model(prompt(9), **cache)


@torch.no_grad()
def test_a_step_captured_under_autocast_is_captured_again_outside(monkeypatch):
    model, profile = tiny_model("llama"), PROFILES["static"]
    enable(model, profile)
    ids = prompt(30)
    cache = StaticClusteredCache(model, profile, 60)
    model(ids, past_key_values=cache)
    with played(monkeypatch):
        graph = DecodeGraph(model, cache)
        graph.step(ids[:, :1])
        recorded = graph._graph
        cache.crop(-1)
        with region(torch.bfloat16):
            low = graph.step(ids[:, :1]).clone()
            assert graph._graph is not recorded
        cache.crop(-1)
        got = graph.step(ids[:, :1])
    want = model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert low.dtype == torch.bfloat16
