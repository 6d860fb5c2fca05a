"""Replayed decode steps against the same steps run by Python; on CUDA only."""

import pytest
import torch

from chai_attention.errors import CacheError, UnsupportedModelError
from chai_attention.integrations.transformers import (
    ClusteredCache,
    DecodeGraph,
    StaticClusteredCache,
    disable,
    enable,
)
from chai_attention.profile import ClusterProfile
from tiny_models import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WINDOW = {
    "recent": 5,
    "sinks": 3,
    "offsets": torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(2)).tolist(),
}
REP = ((0, 0, 4, 4, 4, 0), (0, 1, 2, 3, 4, 5), (3, 1, 1, 3, 3, 5))
STATIC = {"membership": "static", "representatives": REP}
ONLINE = {"window": 6}
CASES = [
    pytest.param(family, kind, window, id=f"{family}-{name}{'-recent' if window else ''}")
    for family in ("llama", "llama-grouped", "opt", "qwen2")
    for name, kind in (("static", STATIC), ("online", ONLINE))
    for window in ({}, WINDOW)
]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
ROOM = 90


def made(family, kind, window):
    model = tiny_model(family).to("cuda")
    profile = ClusterProfile(clusters=(2, 6, 3), **kind, **window)
    enable(model, profile)
    return model, profile


def prompt(length, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, length), generator=generator).cuda()


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("padding", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(("family", "kind", "window"), CASES)
def test_a_replay_is_the_step(family, kind, window, padding):
    model, profile = made(family, kind, window)
    ids = prompt(81)
    mask = torch.ones_like(ids)
    if padding:
        mask[1, :20] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    first = {"attention_mask": mask[:, :61], "position_ids": positions[:, :61]}
    eager, cache = ClusteredCache(model, profile), StaticClusteredCache(model, profile, ROOM)
    want = model(ids[:, :61], past_key_values=eager, **first).logits
    close(model(ids[:, :61], past_key_values=cache, **first).logits[mask[:, :61].bool()],
          want[mask[:, :61].bool()])  # fmt: skip
    graph = DecodeGraph(model, cache)
    for at in range(61, 81):
        step, here = ids[:, at : at + 1], positions[:, at : at + 1]
        seen = mask[:, : at + 1]
        want = model(step, attention_mask=seen, position_ids=here, past_key_values=eager).logits
        close(graph.step(step, here, seen if at % 2 else None), want)
        assert cache.get_seq_length() == at + 1


@torch.no_grad()
def test_steps_between_replays_and_requests_in_the_same_memory():
    """Eager steps, a crop, chunks and a second prompt do not need another capture."""
    model, profile = made("llama", STATIC, {})
    cache = StaticClusteredCache(model, profile, ROOM)
    graph = DecodeGraph(model, cache)
    recorded = None
    for seed in (0, 1):
        ids = prompt(60, seed=seed)
        want = model(ids, use_cache=False).logits
        cache.reset()
        parts = [model(ids[:, :40], past_key_values=cache).logits]
        parts.append(graph.step(ids[:, 40:41]).clone())
        recorded = recorded or graph._graph
        parts.append(model(ids[:, 41:42], past_key_values=cache).logits)
        parts.append(graph.step(ids[:, 42:43]).clone())
        graph.step(ids[:, :1])
        cache.crop(-1)
        parts.append(graph.step(ids[:, 43:44]).clone())
        parts.append(model(ids[:, 44:59], past_key_values=cache).logits)
        parts.append(graph.step(ids[:, 59:]).clone())
        close(torch.cat(parts, 1), want)
        assert graph._graph is recorded


@torch.no_grad()
@pytest.mark.parametrize("kind", [STATIC, ONLINE], ids=["static", "online"])
def test_what_changes_is_captured_again(kind):
    model, profile = made("llama", kind, WINDOW)
    cache = StaticClusteredCache(model, profile, ROOM)
    graph = DecodeGraph(model, cache)

    def check(seed):
        ids = prompt(60, seed=seed)
        cache.reset()
        model(ids[:, :59], past_key_values=cache)
        got = graph.step(ids[:, 59:])
        close(got, model(ids, use_cache=False).logits[:, 59:])

    check(0)
    check(1)  # another membership
    disable(model)
    with pytest.raises(CacheError, match="are off"):
        graph.step(prompt(1))
    enable(model, profile)  # projections in other memory
    check(2)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.01
    check(3)


@pytest.mark.parametrize(("family", "kind", "window"), CASES)
def test_generate_replays_by_itself(family, kind, window, monkeypatch):
    model, profile = made(family, kind, window)
    ids = prompt(60)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    options = {"attention_mask": mask, **GREEDY}
    want = model.generate(ids, **options)
    steps = []
    original = DecodeGraph.step
    monkeypatch.setattr(DecodeGraph, "step", lambda *a: steps.append(1) or original(*a))
    cache = StaticClusteredCache(model, profile, ROOM)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    assert len(steps) == 11
    got = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(got, want)
    assert len(steps) == 22
    cache.reset()
    got = model.generate(ids, past_key_values=cache, disable_compile=True, **options)
    assert torch.equal(got, want)
    assert len(steps) == 22


def test_short_prompts_replay_from_the_end_of_their_window():
    model, _ = made("llama", ONLINE, WINDOW)
    ids = prompt(3)
    options = {"attention_mask": torch.ones_like(ids), **GREEDY}
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), want)


def test_what_cannot_be_captured_is_refused_or_runs_as_it_is():
    model, profile = made("llama", ONLINE, {})
    cache = StaticClusteredCache(model, profile, 20)
    graph = DecodeGraph(model, cache)
    with pytest.raises(CacheError, match="fills the probe window"):
        graph.step(prompt(1))
    with torch.no_grad():
        model(prompt(18), past_key_values=cache)
        model(prompt(1), past_key_values=cache)  # the window is full for good
    with pytest.raises(CacheError, match="one token of each of 2"):
        graph.step(prompt(2))
    graph.step(prompt(1))
    with pytest.raises(CacheError, match="room for 20"):
        graph.step(prompt(1))

    gemma = tiny_model("gemma2").to("cuda")
    profile = ClusterProfile((6, 3, 3), window=8)
    enable(gemma, profile)
    with pytest.raises(UnsupportedModelError, match="sliding-window"):
        DecodeGraph(gemma, StaticClusteredCache(gemma, profile, 60))
    ids = prompt(40)
    options = {"attention_mask": torch.ones_like(ids), **GREEDY}
    want = gemma.generate(ids, **options)
    assert torch.equal(gemma.generate(ids, cache_implementation="static", **options), want)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_replay_waits_for_nothing_and_allocates_nothing():
    model, profile = made("llama", STATIC, WINDOW)
    cache = StaticClusteredCache(model, profile, ROOM, batch_size=2)
    model(prompt(40), past_key_values=cache)
    graph = DecodeGraph(model, cache)
    step, here = prompt(1), torch.full((2, 1), 40, device="cuda")
    graph.step(step, here)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            graph.step(step, here)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before
