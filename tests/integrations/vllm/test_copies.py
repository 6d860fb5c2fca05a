"""Prompts over copies of 8-bit pages, against the pages and the definition; no vLLM needed."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from chai_attention.integrations.vllm import attend
from chai_attention.integrations.vllm.attend import StepAttention
from chai_attention.integrations.vllm.copies import (
    LEAST_QUERIES,
    DequantisationWorkspace,
    workspace_numbers,
)
from chai_attention.integrations.vllm.layers import LayerShard, PageLayout, Pages
from chai_attention.integrations.vllm.memberships import FixedMembership
from chai_attention.integrations.vllm.metadata import ChaiMetadata, LocalTables
from chai_attention.integrations.vllm.request_spans import RequestSpans
from chai_attention.ops import reference
from chai_attention.ops.fp8 import FLOAT8, as_stored
from chai_attention.runtime.plan import LayerPlan
from helpers import definition
from page_writes import write_paged

DIM, PAGE, LOCAL_PAGE, RECENT, SINKS = 16, 32, 16, 21, 3
EVERY = tuple(range(6))
KINDS = {
    "no window": LayerPlan(0, 6, 6, 3, 8, "scores", (0, 0, 2, 2, 0, 5)),
    "window": LayerPlan(
        0, 6, 6, 3, 8, "scores", (0, 0, 2, 2, 0, 5), recent=RECENT, sinks=SINKS
    ),
    "streaming": LayerPlan(
        0, 6, 6, 2, 8, "scores", (0, 0, 2, 3, 2, 5), recent=RECENT, sinks=SINKS, streaming=(3, 5)
    ),
    "all stream": LayerPlan(
        0, 6, 6, 0, 8, "scores", EVERY, recent=RECENT, sinks=20, streaming=EVERY
    ),
    "grouped queries": LayerPlan(
        0, 6, 3, 1, 8, "scores", (0, 0, 2, 3, 4, 5), recent=RECENT, sinks=SINKS,
        streaming=(2, 3, 4, 5),
    ),
    # far pages hold the heads of all clusters
    "window without local pages": LayerPlan(
        0, 6, 3, 3, 8, "scores", (0, 0, 2, 2, 4, 4), recent=RECENT, sinks=SINKS
    ),
}  # fmt: skip
# context and new tokens of each request; decodes come first, requests without context last
STEPS = {
    "one": [(100, 70)],
    "short context": [(5, 66)],
    "beside others": [(40, 1), (96, LEAST_QUERIES), (33, 3), (64, 32)],
    "beside a new one": [(130, 1), (47, 80), (0, 70)],
    "a short new one": [(47, 80), (0, 7)],
}


class Case(NamedTuple):
    layer: LayerShard
    pages: Pages
    step: ChaiMetadata
    states: tuple[Tensor, Tensor, Tensor]  # Q, K and V of all requests' tokens, as pages hold them
    new: Tensor  # which of them are new


def tables(lengths: list[int], page: int, spare: int) -> Tensor:
    """Block tables of pages in random order, none of them page 0."""
    counts = [-(-length // page) for length in lengths]
    order, table = torch.randperm(sum(counts)) + 1, torch.zeros(len(lengths), max(counts) + spare)
    for row, count in enumerate(counts):
        table[row, :count], order = order[:count], order[count:]
    return table.int()


def slots(table: Tensor, row: int, position: Tensor, page: int) -> Tensor:
    return table[row, position // page].long() * page + position % page


def case_of(plan: LayerPlan, spans: list[tuple[int, int]]) -> Case:
    layer = LayerShard(plan, kept_keys(plan), plan.representatives)
    lengths = [context + new for context, new in spans]
    table, local_table = tables(lengths, PAGE, 1), tables(lengths, LOCAL_PAGE, 2)
    layout, local_layout = layer.layout(DIM, DIM), layer.local_layout(DIM, DIM)

    def memory(count: int, page: int, layout: PageLayout) -> tuple[Tensor, Tensor]:
        raw = torch.full((count + 1, 1, page, layout.numbers_per_token), torch.nan)
        return layout.split(raw.to(FLOAT8))

    pages = Pages(
        *memory(int(table.max()), PAGE, layout),
        *(memory(int(local_table.max()), LOCAL_PAGE, local_layout) if local_layout else ()),
    )
    query, key, value = (
        torch.randn(sum(lengths), heads, DIM)
        for heads in (plan.heads, plan.kv_heads, plan.kv_heads)
    )
    where = [(row, torch.arange(length)) for row, length in enumerate(lengths)]
    local = None
    if local_layout is not None:
        local = StepAttention(plan, None, 1.0, None).local_pages(pages, local_table, table)
    elif plan.has_recent_window:
        local = StepAttention(plan, None, 1.0, None).local_pages(pages, None, table)
    far_slots = torch.cat([slots(table, row, at, PAGE) for row, at in where])
    local_slots = torch.cat([slots(local_table, row, at, LOCAL_PAGE) for row, at in where])
    write_paged(
        key, value, pages.key, pages.value, far_slots, layer.membership(), local=local,
        local_slot_mapping=far_slots if local_layout is None else local_slots,
    )  # fmt: skip
    if local_layout is not None:  # what lies before the window is given back
        sinks = -(-plan.sinks // LOCAL_PAGE)
        for row, (context, _) in enumerate(spans):
            for index in range(sinks, max(0, context - plan.recent + 1) // LOCAL_PAGE):
                for states in (pages.local_key, pages.local_value):
                    states[local_table[row, index]] = torch.tensor(torch.nan).to(FLOAT8)
                local_table[row, index] = 0
    new = torch.cat([at >= spans[row][0] for row, at in where])
    counts = torch.tensor([0, *(count for _, count in spans)]).cumsum(0)
    step = ChaiMetadata(
        RequestSpans(counts, lengths), int(counts[-1]),
        sum(count == 1 for _, count in spans), counts.int(),
        torch.tensor(lengths, dtype=torch.int32), table, far_slots[new],
        table[:, 0].contiguous(), torch.zeros(int(counts[-1]), dtype=torch.int32),
        max(count for _, count in spans), max(lengths), False,
        LocalTables(local_table, local_slots[new]) if local_layout is not None else None,
    )  # fmt: skip
    return Case(layer, pages, step, (query, as_stored(key), as_stored(value)), new)


def kept_keys(plan: LayerPlan) -> int:
    far = [head for head in range(plan.heads) if head not in plan.streaming]
    return len({plan.representatives[head] // (plan.heads // plan.kv_heads) for head in far})


def attended(case: Case, workspace: DequantisationWorkspace | None) -> Tensor:
    memberships = FixedMembership(case.layer, len(case.step.requests), torch.device("cpu"))
    attention = StepAttention(case.layer.plan, memberships, 0.3, None, workspace)
    query, key, value = (states[case.new] for states in case.states)
    out = torch.full_like(query, torch.nan)
    attention.run(case.step, query, key, value, case.pages, out)
    return out


def defined(case: Case) -> Tensor:
    """Head by head over K and V as they are rounded."""
    plan, member, out, start = case.layer.plan, case.layer.membership(), [], 0
    for each in case.step.requests:
        own = slice(start, start + each.seq_len)
        start = own.stop
        q, k, v = (x[own].double().transpose(0, 1)[None] for x in case.states)
        if plan.recent:
            whole = reference.recent_attention(
                q, k, v, member, recent=plan.recent, sinks=plan.sinks, scale=0.3
            )
        else:
            whole = definition(q, k, v, torch.tensor([plan.representatives]), 0.3)
        out.append(whole[0, each.context_len :])
    return torch.cat(out)


@pytest.fixture
def widened(monkeypatch) -> list[Pages | None]:
    """What workspaces gave."""
    found, widen = [], DequantisationWorkspace.widen
    monkeypatch.setattr(
        DequantisationWorkspace, "widen", lambda *args: found.append(widen(*args)) or found[-1]
    )
    return found


@pytest.mark.parametrize("spans", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [0, 5])
def test_copies_give_what_pages_give(kind, spans, drafts, widened) -> None:
    plan = KINDS[kind]
    case = case_of(plan, spans)
    workspace = DequantisationWorkspace(torch.float32, torch.device("cpu"), drafts)
    workspace.reserve(workspace_numbers(case.layer, DIM, DIM, 200, 200, LOCAL_PAGE, drafts))
    got = attended(case, workspace)
    assert len(widened) == 1
    assert widened[0] is not None
    assert torch.equal(got, attended(case, None))
    torch.testing.assert_close(got.double(), defined(case), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["no window", "streaming"])
def test_prompts_without_room_for_copies_read_the_pages(kind, widened) -> None:
    case = case_of(KINDS[kind], STEPS["beside others"])
    workspace = DequantisationWorkspace(torch.float32, torch.device("cpu"))
    workspace.reserve(1000)
    got = attended(case, workspace)
    assert widened == [None]
    assert torch.equal(got, attended(case, None))


@pytest.mark.parametrize("kind", ["no window", "window"])
def test_few_queries_read_the_pages(kind, widened) -> None:
    case = case_of(KINDS[kind], [(100, LEAST_QUERIES - 1), (50, 4)])
    workspace = DequantisationWorkspace(torch.float32, torch.device("cpu"))
    workspace.reserve(10**6)
    attended(case, workspace)
    assert widened == []


def test_steps_that_compile_kernels_do_it_for_both_ways(monkeypatch) -> None:
    case, seen = case_of(KINDS["window"], STEPS["one"]), []
    workspace = DequantisationWorkspace(torch.float32, torch.device("cpu"))
    workspace.reserve(10**6)
    run = attend.paged_prefill
    monkeypatch.setattr(
        attend, "paged_prefill", lambda q, kv, *rest: seen.append(kv.key.dtype) or run(q, kv, *rest)
    )
    case.step.is_warm_up = True
    attended(case, workspace)
    assert seen == [torch.float32, FLOAT8]


def test_only_pages_that_new_tokens_see_are_copied() -> None:
    # contexts of 100 and 5; one request has no tokens in this step
    local = torch.arange(1, 31, dtype=torch.int32).view(3, 10)
    none = torch.zeros(3, dtype=torch.int32)
    step = ChaiMetadata(
        RequestSpans([0, 30, 30, 70], [130, 99, 45]), 70, 0, none, none, local + 40, none, none,
        none, 40, 130, False, LocalTables(local, none),
    )  # fmt: skip
    # tokens from 100 - 21 + 1 = 80 on, and the first three; and all of 45 tokens
    used = step.used_local_pages(0, 3, 16, 21, 3)
    assert used.pages.tolist() == [1, 6, 7, 8, 9, 21, 22, 23]
    assert used.pages.dtype == torch.int64
    assert used.block_table.dtype == torch.int32
    table = used.block_table.tolist()
    assert (table[0][0], table[0][5:9]) == (0, [1, 2, 3, 4])
    assert table[2][:3] == [5, 6, 7]
    assert all(0 <= place < 8 for row in table for place in row)
    # without sinks, and of the last request alone
    assert step.used_local_pages(0, 1, 16, 21, 0).pages.tolist() == [6, 7, 8, 9]
    assert step.used_local_pages(2, 3, 16, 21, 3).block_table.tolist() == [[0, 1, 2]]
    # far pages: all
    far = step.used_pages(0, 3, 64)
    assert far.pages.tolist() == [41, 42, 43, 61]
    assert far.block_table.tolist() == [[0, 1, 2], [3, 3, 3], [3, 3, 3]]


@pytest.mark.parametrize("tokens", [200, 8192])
@pytest.mark.parametrize("recent", [9, 128, 512])
def test_there_is_room_for_the_windows_of_16_requests(tokens: int, recent: int) -> None:
    layer = LayerShard(
        LayerPlan(0, 6, 6, 3, 8, "scores", (0, 0, 2, 2, 0, 5), recent=recent, sinks=4),
        3, (0, 0, 2, 2, 0, 5),
    )  # fmt: skip
    # 16 prompts whose windows begin and end in the middle of pages
    new = [tokens // 16] * 15 + [tokens - 15 * (tokens // 16)]
    context = [1000 + 7 * n for n in range(16)]
    lengths = [a + b for a, b in zip(context, new, strict=True)]
    starts = torch.tensor([0, *new]).cumsum(0)
    none, table = torch.zeros(16, dtype=torch.int32), torch.zeros(16, 999, dtype=torch.int32)
    step = ChaiMetadata(
        RequestSpans(starts, lengths), tokens, 0, none, none, table, none, none, none,
        max(new), max(lengths), False, LocalTables(table, none),
    )  # fmt: skip
    used = step.used_local_pages(0, 16, 48, recent, 4)
    numbers = workspace_numbers(layer, 8, 8, tokens, 8192, 48)
    far = min(tokens + 8192, 32768) * layer.layout(8, 8).numbers_per_token
    local = layer.local_layout(8, 8)
    assert local is not None
    assert far + used.pages.shape[0] * 48 * local.numbers_per_token <= numbers
