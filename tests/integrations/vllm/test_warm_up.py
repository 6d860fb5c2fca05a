"""Steps that compile kernels: of all kinds, and without a trace in the cache; no vLLM needed."""

from types import SimpleNamespace

import pytest
import torch

from chai_attention.integrations.vllm import warm_up
from chai_attention.integrations.vllm.attend import LEAST_VARLEN, StepAttention
from chai_attention.integrations.vllm.layers import LayerShard, Pages
from chai_attention.integrations.vllm.memberships import FixedMembership
from chai_attention.runtime.plan import LayerPlan
from page_writes import write_paged

DIM, PAGE = 16, 16


def model_of(requests: int, longest: int, local: torch.Tensor | None = None) -> SimpleNamespace:
    model = SimpleNamespace(max_model_len=longest)
    layer = None if local is None else SimpleNamespace(kv_cache=local)
    config = SimpleNamespace(model_config=model)
    return SimpleNamespace(max_requests=requests, local=layer, config=config)


def test_kinds_of_steps() -> None:
    cache = torch.zeros(4, 1, PAGE, 1)
    steps = list(warm_up.steps(model_of(640, 8192), cache))
    decodes = {(step.num_decodes, step.max_seq_len) for step in steps if step.num_decodes}
    assert {(1, 64), (1, 8192), (8, 128), (640, 64), (640, 8192)} <= decodes
    prompts = [step for step in steps if not step.num_decodes]
    tokens = {(each.query_len, each.context_len > 0) for step in prompts for each in step.requests}
    assert {(16, True), (64, True), (128, True), (16, False), (128, False)} == tokens
    kinds = {
        (part.is_new, part.has_new)
        for step in prompts
        for part in step.prefill_batches(LEAST_VARLEN)
    }
    assert kinds == {(True, True), (False, True), (False, False)}
    assert max(n for n, context in tokens if not context) >= LEAST_VARLEN
    assert not any(step.new for step in steps if step.num_decodes)


def test_a_model_of_short_contexts_has_steps_behind_its_longest() -> None:
    """Also there a context may be long enough for several programs."""
    steps = warm_up.steps(model_of(1, 1024), torch.zeros(4, 1, PAGE, 1))
    found = {(step.max_query_len, step.max_seq_len) for step in steps if not step.num_decodes}
    assert {(16, 1024), (64, 1024), (128, 1024)} <= found


@pytest.mark.parametrize("longest", [1, 20, 100])
@pytest.mark.parametrize("window", [0, 4])
def test_nothing_is_written(longest: int, window: int) -> None:
    rep = (0, 0, 2, 2, 0)
    plan = LayerPlan(0, 5, 5, 2, 8, "scores", rep, recent=window, sinks=1 if window else 0)
    layer = LayerShard(plan, 2, rep)
    layout, local_layout = layer.layout(DIM, DIM), layer.local_layout(DIM, DIM)
    cache = torch.randn(4, 1, PAGE, layout.numbers_per_token)
    local_cache, local = None, None
    if local_layout is not None:
        local_cache = torch.randn(4, 1, 48, local_layout.numbers_per_token)
        local = local_layout.split(local_cache)
    before = cache.clone(), None if local_cache is None else local_cache.clone()
    memberships = FixedMembership(layer, 3, torch.device("cpu"))
    attention = StepAttention(plan, memberships, 0.3, None)
    pages = Pages(*layout.split(cache), *(local or ()))
    for step in warm_up.steps(model_of(3, longest, local_cache), cache):
        query, key, value = torch.randn(3, step.num_actual_tokens, 5, DIM)
        out = torch.full_like(query, torch.nan)
        local_table = None if step.local is None else step.local.block_table
        write_paged(
            key, value, pages.key, pages.value, step.slot_mapping,
            memberships.of(step.first_pages)[0],
            local=attention.local_pages(pages, local_table, step.block_table),
            local_slot_mapping=attention.local_slots(step, pages),
        )  # fmt: skip
        attention.run(step, query, key, value, pages, out)
        assert out.isfinite().all()
    assert (local is None) == (not window)
    assert cache.equal(before[0])
    assert local_cache is None or local_cache.equal(before[1])
