"""Steps that compile kernels: of all kinds, and without a trace in the cache; no vLLM needed."""

from types import SimpleNamespace

import pytest
import torch

from chai_attention.integrations.transformers.plan import LayerPlan
from chai_attention.integrations.vllm import warm_up
from chai_attention.integrations.vllm.attend import LEAST_VARLEN, StepAttention
from chai_attention.integrations.vllm.layers import ServedLayer
from chai_attention.integrations.vllm.memberships import FixedMembership
from chai_attention.integrations.vllm.window import RecentPool
from chai_attention.ops.cache_write import write_paged

DIM, PAGE = 16, 16


def served(rows: int, longest: int, window: int = 0) -> SimpleNamespace:
    model = SimpleNamespace(max_model_len=longest)
    return SimpleNamespace(
        rows=rows, window=window, config=SimpleNamespace(model_config=model), requests=2
    )


def test_kinds_of_steps() -> None:
    cache = torch.zeros(4, 1, PAGE, 1)
    steps = list(warm_up.steps(served(640, 8192), cache))
    decodes = {(step.decodes, step.most_keys) for step in steps if step.decodes}
    assert {(1, 64), (1, 8192), (8, 128), (640, 64), (640, 8192)} <= decodes
    prompts = [step for step in steps if not step.decodes]
    tokens = {(row.tokens, row.context > 0) for step in prompts for row in step.rows}
    assert {(16, True), (64, True), (128, True), (128, False)} == tokens
    assert max(n for n, context in tokens if not context) >= LEAST_VARLEN
    assert not any(step.fresh for step in steps if step.decodes)


@pytest.mark.parametrize("longest", [1, 20, 100])
@pytest.mark.parametrize("window", [0, 4])
def test_nothing_is_written(longest: int, window: int) -> None:
    rep = (0, 0, 2, 2, 0)
    plan = LayerPlan(0, 5, 5, 2, 8, "scores", rep, recent=window, sinks=1 if window else 0)
    layer = ServedLayer(plan, 2, rep)
    pool = RecentPool(layer, 2, DIM, 0, torch.float32, torch.device("cpu")) if window else None
    layout = layer.layout(DIM, DIM)
    cache = torch.randn(4, 1, PAGE, layout.numbers_per_token)
    before = cache.clone(), None if pool is None else pool.near.ring.clone()
    memberships = FixedMembership(layer, 3, torch.device("cpu"))
    attention = StepAttention(plan, memberships, pool, 0.3, None, together=True)
    pages = layout.split(cache)
    for step in warm_up.steps(served(3, longest, window), cache):
        query, key, value = torch.randn(3, step.tokens, 5, DIM)
        out = torch.full_like(query, torch.nan)
        earlier = attention.before(step)
        write_paged(
            key, value, *pages, step.slot_mapping, memberships.of(step.pages)[0],
            near=None if pool is None else pool.near, positions=step.positions,
            near_rows=step.token_slots,
        )  # fmt: skip
        attention.run(step, query, key, value, pages, earlier, out)
        assert out.isfinite().all()
    assert cache.equal(before[0])
    assert pool is None or pool.near.ring.equal(before[1])
