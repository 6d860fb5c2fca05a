"""What a captured step may depend on: recorded and replayed on the CPU, see `recorded_graph`."""

import pytest
import torch

from chai_attention.integrations.transformers import (
    ClusteredCache,
    DecodeGraph,
    StaticClusteredCache,
    enable,
)
from chai_attention.profile import ClusterProfile
from recorded_graph import played
from tiny_models import tiny_model

WINDOW = {
    "recent": 5,
    "sinks": 3,
    "offsets": torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(2)).tolist(),
}
REP = ((0, 0, 4, 4, 4, 0), (0, 1, 2, 3, 4, 5), (3, 1, 1, 3, 3, 5))
KINDS = {"static": {"membership": "static", "representatives": REP}, "online": {"window": 6}}


@torch.no_grad()
@pytest.mark.parametrize("padding", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("window", [{}, WINDOW], ids=["", "recent"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt", "qwen2", "gpt2"])
def test_a_replayed_step_is_the_step(family, kind, window, padding, monkeypatch):
    model = tiny_model(family)
    profile = ClusterProfile(clusters=(2, 6, 3), **KINDS[kind], **window)
    enable(model, profile)
    ids = torch.randint(3, 97, (2, 56))
    mask = torch.ones_like(ids)
    if padding:
        mask[1, :39] = 0  # the last sink comes with a step
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if kind == "online":
        mask[1, 30:] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
    eager, cache = ClusteredCache(model, profile), StaticClusteredCache(model, profile, 60)
    first = {"attention_mask": mask[:, :41], "position_ids": positions[:, :41]}
    for one in (eager, cache):
        model(ids[:, :40], past_key_values=one, **{k: v[:, :40] for k, v in first.items()})
        model(ids[:, 40:41], past_key_values=one, attention_mask=first["attention_mask"],
              position_ids=positions[:, 40:41])  # fmt: skip
    with played(monkeypatch):
        graph = DecodeGraph(model, cache)
        recorded = None
        for at in range(41, 56):
            step, here = ids[:, at : at + 1], positions[:, at : at + 1]
            seen = mask[:, : at + 1]
            got = graph.step(step, here, seen if at % 2 and padding else None)
            recorded = recorded or graph._graph
            assert graph._graph is recorded
            want = model(step, attention_mask=seen, position_ids=here, past_key_values=eager)
            torch.testing.assert_close(got, want.logits, atol=2e-5, rtol=1e-5)
            assert cache.get_seq_length() == at + 1


@torch.no_grad()
@pytest.mark.parametrize("window", [{}, WINDOW], ids=["", "recent"])
def test_steps_over_memory_that_no_prompt_has_filled(window, monkeypatch):
    """What a benchmark does: any K and V, a step at any length, the same one over and over."""
    model = tiny_model("llama")
    profile = ClusterProfile(clusters=(2, 6, 3), **KINDS["static"], **window)
    enable(model, profile)
    ids = torch.randint(3, 97, (2, 40))
    full = StaticClusteredCache(model, profile, 40)
    model(ids[:, :39], past_key_values=full)
    cache = StaticClusteredCache(model, profile, max_tokens=40, batch_size=2)
    for layer, other in zip(cache.layers, full.layers, strict=True):
        for name, tensor in layer.tensors().items():
            tensor.copy_(other.tensors()[name])
    want = model(ids[:, 39:], past_key_values=full).logits
    with played(monkeypatch):
        graph = DecodeGraph(model, cache)
        for _ in range(3):
            cache.rewind(39)
            torch.testing.assert_close(graph.step(ids[:, 39:]), want, atol=2e-5, rtol=1e-5)


def test_generate_replays(monkeypatch):
    """Through generate's own loop: prompt, first step captured, all others replayed."""
    model = tiny_model("llama")
    profile = ClusterProfile(clusters=(2, 6, 3), **KINDS["online"], **WINDOW)
    enable(model, profile)
    ids = torch.randint(3, 97, (2, 50))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    options["eos_token_id"] = None
    want = model.generate(ids, **options)
    # on the CPU generate() does not ask by itself
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_: True)
    with played(monkeypatch):
        out = model.generate(
            ids, cache_implementation="static", return_dict_in_generate=True, **options
        )
    assert torch.equal(out.sequences, want)
    assert out.past_key_values.graph is not None
    assert out.past_key_values.get_seq_length() == 61
