"""Packed prefill with an exact window: the kernel against the definition, or interpreted."""

import logging

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from chai_attention.ops import Probe
from chai_attention.ops.narrow import FLOAT8
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.windowed import head_offsets
from helpers import random_membership
from near_cases import near_pages
from op_calls import dispatched, kernels
from packed_cases import packed_case

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies bfloat16 wrongly
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _nan_memory(nan_memory):
    """Fresh memory holds NaN."""


def double(x):
    return x.cpu().double()


def check(
    heads, kv_heads, clusters, streaming, queries, contexts, dim, dtype, *, recent=32, sinks=4,
    page=16, near_page=16, value_dim=None, one_buffer=False, softcap=None, probe_end=0,
    shared=False, offsets=True, stored=None, tail=3,
):  # fmt: skip
    """Without ``contexts`` prompts are packed, their K and V a part of one tensor with Q."""
    batch, total, value_dim = len(queries), sum(queries), value_dim or dim
    tables = random_membership(heads, clusters, 1 if shared else batch + 2, kv_heads, streaming)
    rows = None if shared else torch.randint(0, batch + 2, (batch,), dtype=torch.int32)
    member = tables.expand(batch) if rows is None else tables.select(rows.long())
    case = packed_case(
        member, queries, contexts or [0] * batch, page, dim, value_dim, dtype, DEVICE, one_buffer,
        tail, stored,
    )  # fmt: skip
    table = torch.randn(heads, heads) if offsets else None
    offset = head_offsets(table, member)
    probe = Probe(case.query, case.key, case.value, probe_end) if probe_end else None
    want_probe = Probe(*(double(x) for x in probe[:3]), probe_end) if probe else None
    options = {"most_queries": max(queries), "scale": dim**-0.5, "softcap": softcap}
    out = torch.full((total + tail, heads + 1, value_dim), torch.nan, dtype=dtype)
    out = out.to(DEVICE)[:, 1:]
    given = {
        "offset": None if offset is None else offset.to(DEVICE), "probe": probe,
        "rows": None if rows is None else rows.to(DEVICE), "query_starts": case.starts,
    }  # fmt: skip
    wanted = {
        "offset": offset, "probe": want_probe, "rows": rows, "query_starts": case.starts.cpu(),
    }  # fmt: skip
    if contexts is None:
        fused = torch.cat([case.query, case.key, case.value.expand_as(case.key)], 1)
        states = fused.split([heads, kv_heads, kv_heads], 1)
        options |= {"natural_order": True, "recent": recent, "sinks": sinks}
        want, _ = dispatched.varlen_prefill(
            *(double(x) for x in states), tables, **wanted, **options
        )
        kernels.varlen_prefill(*states, tables.to(DEVICE), out, **given, **options)
    else:
        caches = case.caches
        near = near_pages(member, caches, queries, near_page, recent, sinks)
        want, _ = dispatched.paged_prefill(
            double(case.query), double(caches.keys), double(caches.values), caches.table.cpu(),
            tables, lengths=caches.lengths.cpu(),
            near=NearPages(
                double(near.key), double(near.value), near.block_table.cpu(), recent, sinks
            ),
            **wanted, **options,
        )  # fmt: skip
        kernels.paged_prefill(
            case.query, caches.keys, caches.values, caches.table, tables.to(DEVICE), out,
            lengths=caches.lengths, near=near, **given, **options,
        )  # fmt: skip
    assert_close(double(out[:total]), want[:total], atol=TOLERANCE[dtype], rtol=0)
    assert out[total:].isnan().all()


# heads, K/V heads, clusters, streaming heads, head size
SHAPES = [
    (9, 9, 4, 0, 48), (12, 12, 3, 5, 64), (32, 32, 5, 12, 128), (9, 3, 2, 4, 80), (6, 6, 0, 6, 32),
    (8, 2, 3, 5, 64), (6, 3, 0, 6, 32), (8, 8, 1, 7, 96),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("one_buffer", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "streaming", "dim"), SHAPES)
def test_fresh_and_continued_sequences(
    heads, kv_heads, clusters, streaming, dim, one_buffer, dtype
):
    check(
        heads, kv_heads, clusters, streaming, [5, 1, 63, 0, 2], [0, 70, 30, 0, 129], dim, dtype,
        one_buffer=one_buffer,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "streaming", "dim"), SHAPES)
def test_packed_prompts(heads, kv_heads, clusters, streaming, dim, dtype):
    check(heads, kv_heads, clusters, streaming, [5, 1, 83, 0, 40], None, dim, dtype, recent=20)


@pytest.mark.parametrize(("page", "near_page"), [(16, 48), (64, 16), (64, 48), (48, 32), (16, 64)])
def test_near_pages_smaller_and_larger_than_far_ones(page, near_page):
    check(
        6, 6, 2, 2, [40, 1, 3], [0, 100, 77], 32, torch.float32, page=page, near_page=near_page,
        recent=17,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recent", "sinks"), [(1, 0), (1, 4), (128, 4), (300, 0), (33, 1), (5, 40), (64, 16)]
)
@pytest.mark.parametrize("contexts", [None, [0, 150, 10]])
def test_windows(recent, sinks, contexts):
    check(
        9, 9, 3, 2, [130, 20, 35], contexts, 16, torch.float32, recent=recent, sinks=sinks,
        shared=True,
    )  # fmt: skip


@pytest.mark.parametrize("queries", [1, 5, 63, 129])
@pytest.mark.parametrize("context", [0, 1, 65, 150])
def test_lengths(queries, context):
    check(9, 9, 3, 4, [queries, 3], [context, 0], 64, HALF, shared=True)


@pytest.mark.parametrize("probe_end", [1, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), [(9, 9, 3), (6, 2, 3)])
@pytest.mark.parametrize("contexts", [None, [0, 0, 7]])
def test_first_tokens_of_fresh_prompts_attend_in_full(
    probe_end, heads, kv_heads, clusters, contexts
):
    """Longer and shorter prompts than the probe's window, and a continued one."""
    check(
        heads, kv_heads, clusters, 0, [35, 3, 20], contexts, 32, torch.float32,
        probe_end=probe_end, recent=8,
    )  # fmt: skip


@pytest.mark.parametrize("contexts", [None, [0, 33]])
def test_softcap_sizes_of_v_and_no_offsets(contexts):
    check(
        6, 6, 2, 0, [50, 4], contexts, 32, torch.float32, softcap=3.0, offsets=False, recent=9,
        value_dim=None if contexts is None else 24,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_pages_of_8_bits(dtype):
    check(12, 12, 3, 4, [40, 1, 33], [40, 128, 0], 64, dtype, stored=FLOAT8)


def test_more_sequences_than_are_looked_at_at_a_time():
    check(2, 2, 1, 1, [1, 0, 2] * 45, [0, 3, 20] * 45, 16, torch.float32, recent=4, sinks=1)


def test_sequences_without_keys_get_zeros():
    """Rows of padding in a batch of fixed size: no page, length 0."""
    member = random_membership(6, 2, 2, streaming=2)
    case = packed_case(member, [7, 1], [20, 0], 16, 32, 32, torch.float32, DEVICE)
    near = near_pages(member, case.caches, [7, 1], 16, 4, 2)
    lengths = case.caches.lengths.clone()
    lengths[1] = 0
    out = torch.empty(8, 6, 32, device=DEVICE)
    kernels.paged_prefill(
        case.query, case.caches.keys, case.caches.values, case.caches.table, member.to(DEVICE),
        out, query_starts=case.starts, lengths=lengths, most_queries=7, scale=0.2, near=near,
        offset=head_offsets(None, member).to(DEVICE),
    )  # fmt: skip
    assert (out[7] == 0).all()
    assert not out[:7].isnan().any()


@pytest.mark.skipif(not CUDA, reason="large shapes need a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "streaming"),
    [(32, 32, 4, 0), (32, 32, 8, 12), (12, 12, 0, 12), (32, 8, 4, 10)],
)
def test_large(heads, kv_heads, clusters, streaming, dim, dtype, paged, caplog):
    with caplog.at_level(logging.DEBUG, "chai_attention"):
        check(
            heads, kv_heads, clusters, streaming, [300, 1, 0, 513, 77, 128],
            [0, 700, 0, 1000, 3, 0] if paged else None, dim, dtype, one_buffer=True, recent=128,
            probe_end=32 if not streaming else 0, page=64, near_page=48,
        )  # fmt: skip
    fast = HOPPER and dim != 96
    name = "packed Hopper prefill kernel" if fast else "packed prefill kernel"
    assert f"{name} with a window" in caplog.text


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: its instructions have no interpreter")
@pytest.mark.parametrize(
    ("recent", "sinks"), [(1, 0), (1, 1), (32, 4), (100, 16), (128, 4), (512, 0), (512, 4)]
)
@pytest.mark.parametrize(("page", "near_page"), [(64, 48), (16, 16), (48, 64), (128, 32)])
def test_windows_over_pages_on_hopper(page, near_page, recent, sinks, caplog):
    """Chunks of one and of two members and streaming ones, tiles with and without far keys."""
    with caplog.at_level(logging.DEBUG, "chai_attention"):
        check(
            12, 12, 5, 3, [130, 1, 64, 0, 300, 65], [0, 900, 129, 0, 17, 500], 128,
            torch.bfloat16, recent=recent, sinks=sinks, page=page, near_page=near_page,
        )  # fmt: skip
    assert "packed Hopper prefill kernel with a window, paged" in caplog.text


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: its instructions have no interpreter")
@pytest.mark.parametrize("contexts", [None, [200, 0, 700]])
@pytest.mark.parametrize("clusters", [1, 4, 11, 12])
def test_programs_of_one_member_behind_programs_of_two_on_hopper(clusters, contexts):
    """The second kind once took whatever Q the first one had left in registers."""
    check(
        12, 12, clusters, 0, [400, 65, 257], contexts, 128, torch.bfloat16, recent=16, sinks=1,
        page=64, near_page=48,
    )  # fmt: skip
