"""Kept heads by a stand-in for FlashAttention, which reads pages, and streaming ones by ours."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from chai_attention.integrations.vllm import decode_graphs, flash
from chai_attention.integrations.vllm.attend import StepAttention
from chai_attention.integrations.vllm.decode_graphs import DecodeMemory
from chai_attention.integrations.vllm.flash import (
    FlashSchedules,
    FlashStepAttention,
    HeadKinds,
    Schedule,
    flash_kernels,
)
from chai_attention.integrations.vllm.layers import LayerShard, Pages
from chai_attention.integrations.vllm.memberships import FixedMembership
from chai_attention.integrations.vllm.metadata import ChaiMetadata, LocalTables
from chai_attention.integrations.vllm.request_spans import RequestSpans
from chai_attention.integrations.vllm.shares import layer_shards
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.plan import LayerPlan
from chai_attention.runtime.shape import ModelShape
from helpers import recent_definition
from local_pages_cases import local_case
from page_writes import write_paged
from plain_flash import Planner, plain_flash

DIM, CPU = 16, torch.device("cpu")


def served(
    heads: int, groups: int, streaming: tuple[int, ...], rep: tuple[int, ...] | None = None,
    recent: int = 5,
) -> LayerShard:  # fmt: skip
    rep = tuple(range(heads)) if rep is None else rep
    clusters = len({rep[head] for head in range(heads)} - set(streaming))
    plan = LayerPlan(
        0, heads, groups, clusters, 8, "scores", rep, recent=recent, sinks=3, streaming=streaming
    )
    kept = len({rep[head] * groups // heads for head in range(heads) if head not in streaming})
    return LayerShard(plan, kept, rep)


STEPS = {
    "decodes": [(1, 1), (40, 1), (17, 1)],
    "decodes that pad a graph": [(9, 1), (33, 1), (0, 0), (0, 0)],
    "decodes, chunks and prompts": [(31, 1), (2, 1), (50, 7), (20, 3), (6, 6), (1, 1), (16, 16)],
    "a long prompt beside a chunk": [(80, 12), (70, 70)],
    "prompts": [(66, 66), (3, 3)],
}


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("least", [0, 10, 1000], ids=lambda least: f"from {least} tokens on")
@pytest.mark.parametrize("requests", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    ("heads", "groups", "streaming", "softcap"),
    [
        (8, 4, (4, 5, 6, 7), None),  # slices of the query
        (8, 4, (0, 1), 4.0),
        (8, 4, (0, 1, 4, 5), None),  # gathered
        (10, 5, (2, 3, 8, 9), 4.0),
        (9, 3, (3, 4, 5), None),
    ],
)
def test_both_kinds_of_heads_attend_as_defined(
    heads: int,
    groups: int,
    streaming: tuple[int, ...],
    softcap: float | None,
    requests: list[tuple[int, int]],
    least: int,
    captured: bool,
    monkeypatch,
) -> None:
    """Local pages before the window of a request's first new token are somebody else's."""
    monkeypatch.setattr(flash, "LEAST_TOKENS", least)
    monkeypatch.setattr(decode_graphs, "_capture", lambda run, memory: run)
    calls = check_step(heads, groups, streaming, softcap, requests, captured=captured)
    new = [count for _, count in requests]
    # with all requests of a step, or with its decodes alone
    assert calls == (max(new) == 1 or sum(new) >= least or new[0] == 1)


def check_step(
    heads: int,
    groups: int,
    streaming: tuple[int, ...],
    softcap: float | None,
    requests: list[tuple[int, int]],
    is_warm_up: bool = False,
    captured: bool = False,
) -> int:
    """Compare a step with the definition; how often FlashAttention was called."""
    layer = served(heads, groups, streaming)
    member, kinds = layer.membership(), HeadKinds.of(layer)
    assert kinds is not None
    lengths, new = ([x[place] for x in requests] for place in (0, 1))
    case = local_case(
        member, lengths, write_paged, page=16, local_page=16, dim=DIM, value_dim=DIM,
        dtype=torch.float32, recent=layer.plan.recent + max(new), sinks=layer.plan.sinks,
    )  # fmt: skip
    starts = torch.tensor([0, *new]).cumsum(0)
    decodes = next((n for n, count in enumerate(new) if count > 1), len(new))
    step = ChaiMetadata(
        requests=RequestSpans(starts.tolist(), lengths), num_actual_tokens=sum(new),
        num_decodes=min(decodes, sum(new)), query_start_loc=starts.int(), seq_lens=case.lengths,
        block_table=case.table, slot_mapping=torch.zeros(0), first_pages=case.table[:, 0],
        token_pages=torch.zeros(0), max_query_len=max(new), max_seq_len=max(lengths),
        is_capture=False, local=LocalTables(case.local.block_table, torch.zeros(0)),
        is_warm_up=is_warm_up,
    )  # fmt: skip
    query = torch.randn(sum(new), heads, DIM)
    key, value = (
        torch.cat([x[:, -n:] if n else x[:, :0] for x, n in zip(states, new, strict=True)], 1)
        .transpose(0, 1)
        .contiguous()
        for states in (case.keys, case.values)
    )
    calls = []
    attention = FlashStepAttention(
        layer, kinds, lambda **given: calls.append(plain_flash(**given)),
        FixedMembership(layer, len(requests), CPU), len(requests), 0.3,
        softcap, CPU,
    )  # fmt: skip
    pages = Pages(*case.pages, case.local.key, case.local.value)
    if captured:  # for a request more than there are
        dims, sizes = (DIM, DIM), (16, 16)
        memory = DecodeMemory(
            len(requests) + 1, max(lengths), heads, dims, sizes, torch.float32, CPU
        )
        attention.capture(pages, memory)
        calls.clear()
    out = torch.full((sum(new), heads, DIM), torch.nan)
    attention.run(step, query, key, value, pages, out)
    for row, (length, count) in enumerate(requests):
        if not length:
            continue
        tokens = slice(int(starts[row]), int(starts[row + 1]))
        wanted = recent_definition(
            query[tokens].transpose(0, 1)[None], case.keys[row][None], case.values[row][None],
            member.representatives, 0.3, layer.plan.recent, layer.plan.sinks, None,
            softcap=softcap, streaming=streaming,
        )[0]  # fmt: skip
        assert_close(out[tokens].double(), wanted[-count:], atol=2e-5, rtol=2e-5)
    return len(calls)


@pytest.mark.parametrize(("requests", "calls"), [(STEPS["decodes"], 2), (STEPS["prompts"], 1)])
def test_warm_up_compiles_the_kernels_of_both_ways(requests, calls, monkeypatch) -> None:
    whole, run = [], StepAttention.run

    def counted(self, *args) -> None:
        whole.append(type(self))
        run(self, *args)

    monkeypatch.setattr(StepAttention, "run", counted)
    assert check_step(8, 4, (4, 5, 6, 7), None, requests, is_warm_up=True) == calls
    assert whole == [FlashStepAttention, StepAttention]


def test_slices_where_heads_stand_together_and_copies_where_not() -> None:
    query = torch.randn(3, 6, DIM)
    together = flash._Heads(HeadKinds((0, 1), (2, 3, 4, 5), 1, (1, 2)), CPU)
    kept, streaming = together.of_query(query)
    assert kept.data_ptr() == query.data_ptr()
    assert torch.equal(torch.cat([kept, streaming], 1), query)
    apart = flash._Heads(HeadKinds((0, 1, 4, 5), (2, 3), 2, (1,)), CPU)
    kept, streaming = apart.of_query(query)
    assert torch.equal(kept, query[:, [0, 1, 4, 5]])
    assert torch.equal(streaming, query[:, [2, 3]])
    room, first, second = apart.room(torch.empty_like(query))
    first.copy_(kept)
    second.copy_(streaming)
    out = torch.empty_like(query)
    apart.finish(room, out)
    assert torch.equal(out, query)


def test_layers_that_share_or_split_a_kv_head_keep_our_kernels() -> None:
    assert HeadKinds.of(served(8, 4, (2, 3))) == HeadKinds((0, 1, 4, 5, 6, 7), (2, 3), 3, (1,))
    assert HeadKinds.of(served(8, 4, ())) is None  # vLLM's own attention runs it as a whole
    assert HeadKinds.of(served(8, 4, tuple(range(8)))) is None
    assert HeadKinds.of(served(8, 4, (2,))) is None  # its K/V head is kept for head 3
    assert HeadKinds.of(served(8, 8, (6, 7))) is None  # no query heads have one in common
    assert HeadKinds.of(served(8, 4, (6, 7), rep=(0, 1, 0, 1, 4, 5, 6, 7))) is None
    layer = served(8, 4, (2, 3))
    assert HeadKinds.of(replace(layer, kept=4)) is None  # pages hold a spare head
    online = replace(layer.plan, representatives=None, clusters=4)
    assert HeadKinds.of(replace(layer, plan=online)) is None


def test_ranks_have_heads_of_their_own() -> None:
    shape = ModelShape("llama", 3, 16, 8, 64, (True,) * 3)
    streaming = (0, 1, 12, 13), (2, 3), (0, 1, 2, 3, 12, 13)
    profile = ClusterProfile(
        tuple(16 - len(heads) for heads in streaming), "static", streaming=streaming, recent=5,
        sinks=3, representatives=(tuple(range(16)),) * 3,
    )  # fmt: skip
    first, last = (
        [HeadKinds.of(layer) for layer in layer_shards(shape, profile, 2, rank)] for rank in (0, 1)
    )
    assert first[0] == HeadKinds((2, 3, 4, 5, 6, 7), (0, 1), 3, (0,))
    assert last[0] == HeadKinds((0, 1, 2, 3, 6, 7), (4, 5), 3, (2,))
    # nothing streams on the other rank, so this one keeps all its heads, too
    assert first[1] is last[1] is None
    # the other rank has fewer streaming heads, so this one keeps one of its own
    assert first[2] == HeadKinds((0, 1, 4, 5, 6, 7), (2, 3), 3, (1,))
    assert last[2] == last[0]


def test_without_a_gpu_nothing_is_flash_attention() -> None:
    assert flash_kernels(CPU, torch.bfloat16, 64, 64) is None


def decoding(batch: int, tokens: int | None = None) -> ChaiMetadata:
    """A step of which schedules need to know."""
    most = 1 if tokens is None else tokens
    return ChaiMetadata(
        requests=RequestSpans(range(batch + 1), [1] * batch),
        num_actual_tokens=batch if tokens is None else tokens,
        num_decodes=batch, query_start_loc=torch.arange(batch + 1, dtype=torch.int32),
        seq_lens=torch.ones(batch, dtype=torch.int32), block_table=torch.zeros(batch, 1),
        slot_mapping=torch.zeros(0), first_pages=torch.zeros(0), token_pages=torch.zeros(0),
        max_query_len=most, max_seq_len=9, is_capture=False,
    )  # fmt: skip


def config(full: bool = True, captured: int = 8) -> SimpleNamespace:
    mode = SimpleNamespace(has_full_cudagraphs=lambda: full)
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            cudagraph_mode=mode, max_cudagraph_capture_size=captured
        ),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32),
    )


def test_graphs_find_a_schedule_for_every_number_of_heads_where_it_was() -> None:
    planner = Planner()
    schedules = FlashSchedules(config(), planner, 10, torch.bfloat16, DIM, False)
    for counts in ((6, 3), (2, 1), (6, 3)):
        schedules.add(*counts)
    captured = decoding(8)
    schedules.describe(captured, 64)
    assert [(x["num_heads_q"], x["num_heads_kv"]) for x in planner.asked] == [(6, 3), (2, 1)]
    assert all(x["num_splits"] == 32 and x["page_size"] == 64 for x in planner.asked)
    read = {counts: FlashSchedules.of(captured, *counts).metadata for counts in ((6, 3), (2, 1))}
    later = decoding(8)
    schedules.describe(later, 64)
    for counts, value in (((6, 3), 3), ((2, 1), 4)):
        here = FlashSchedules.of(later, *counts)
        assert here.metadata.data_ptr() == read[counts].data_ptr()
        assert here.splits == 32
        assert read[counts].tolist() == [value] * 33
    fewer = decoding(2)
    schedules.describe(fewer, 64)
    assert FlashSchedules.of(fewer, 6, 3).metadata.shape == (17,)
    assert read[6, 3][17:].tolist() == [0] * 16  # no work of another step


@pytest.mark.parametrize(("step", "full"), [(decoding(9), True), (decoding(3, 8), True),
                                            (decoding(3), False)])  # fmt: skip
def test_steps_that_no_graph_replays_have_no_bound(step: ChaiMetadata, full: bool) -> None:
    planner = Planner()
    schedules = FlashSchedules(config(full), planner, 10, torch.bfloat16, DIM, True)
    schedules.add(4, 2)
    schedules.describe(step, 16)
    assert planner.asked[0]["num_splits"] == 0
    assert planner.asked[0]["has_softcap"]
    assert FlashSchedules.of(step, 4, 2).splits == 0
    assert FlashSchedules.of(step, 4, 2).metadata is not None


def test_trial_steps_have_no_schedule() -> None:
    assert FlashSchedules.of(decoding(2), 4, 2) == Schedule(None, 0)
