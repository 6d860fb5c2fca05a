"""Prefill of packed prompts: the kernels against the definition, on a GPU if there is one."""

import logging

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from chai_attention.ops import Probe
from chai_attention.ops.triton.chunks import chunks_of
from chai_attention.ops.triton.hopper_work import plan
from helpers import random_membership
from op_calls import dispatched, kernels
from packed_cases import packed_case, stored

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies bfloat16 wrongly
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _nan_memory(nan_memory):
    """Fresh memory holds NaN."""


def check(
    heads, kv_heads, clusters, queries, dim, dtype, *, natural=False, softcap=None, probe_end=0,
    shared=False, tail=3,
):  # fmt: skip
    """All heads' queries come as a slice of one tensor with K and V, as from a fused projection."""
    batch, total = len(queries), sum(queries)
    tables = random_membership(heads, clusters, 1 if shared else batch, kv_heads)
    member = tables.expand(batch)
    case = packed_case(member, queries, [0] * batch, 16, dim, dim, dtype, DEVICE, False, tail)
    fused = torch.cat([case.query, case.key, case.value], 1)
    query, key, value = fused.split([heads, kv_heads, kv_heads], 1)
    if not natural:
        key, value = stored(case, member)
    probe = Probe(*fused.split([heads, kv_heads, kv_heads], 1), probe_end) if probe_end else None
    options = {
        "most_queries": max(queries), "scale": dim**-0.5, "softcap": softcap,
        "natural_order": natural,
    }  # fmt: skip
    want, want_lse = dispatched.varlen_prefill(
        *(x.double().cpu() for x in (query, key, value)), tables, query_starts=case.starts.cpu(),
        probe=None if probe is None else Probe(
            *(x.double().cpu() for x in probe[:3]), probe_end
        ), return_lse=True, **options,
    )  # fmt: skip
    out = torch.full((total + tail, heads, dim), torch.nan, dtype=dtype, device=DEVICE)
    _, lse = kernels.varlen_prefill(
        query, key, value, tables.to(DEVICE), out, query_starts=case.starts, probe=probe,
        return_lse=True, **options,
    )  # fmt: skip
    assert_close(out[:total].double().cpu(), want[:total], atol=TOLERANCE[dtype], rtol=0)
    assert out[total:].isnan().all()
    assert_close(lse[:total].cpu(), want_lse[:total], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "dim"),
    [(9, 9, 4, 48), (12, 12, 1, 64), (32, 32, 5, 128), (9, 3, 4, 80), (8, 8, 8, 96)],
)
def test_packed_prompts(heads, kv_heads, clusters, dim, natural, dtype):
    check(heads, kv_heads, clusters, [5, 1, 63, 0, 2], dim, dtype, natural=natural)


@pytest.mark.parametrize("queries", [1, 5, 63, 129])
def test_lengths(queries):
    check(9, 9, 3, [3, queries, 2], 64, HALF, shared=True)


def test_probe_and_softcap():
    check(6, 3, 2, [9, 2, 40], 32, torch.float32, natural=True, probe_end=5, softcap=3.0)


def test_many_sequences():
    """Tiles are found without the lengths on the host: sequences around the size of a tile."""
    check(4, 4, 2, [15, 16, 17, 0, 0, 1, 31, 33, 16, 16, 2], 16, HALF, shared=True)


def test_more_sequences_than_are_looked_at_at_a_time():
    check(2, 2, 1, [1, 0, 2] * 45, 16, torch.float32)


@pytest.mark.skipif(not CUDA, reason="large shapes need a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters"), [(32, 32, 4), (32, 32, 16), (12, 12, 12), (32, 8, 4)]
)
def test_large(heads, kv_heads, clusters, dim, natural, dtype, caplog):
    with caplog.at_level(logging.DEBUG, "chai_attention"):
        check(
            heads, kv_heads, clusters, [300, 1, 0, 513, 77, 128, 1000], dim, dtype,
            natural=natural, probe_end=32,
        )  # fmt: skip
    fast = HOPPER and dim != 96
    assert ("packed Hopper prefill kernel" if fast else "packed prefill kernel") in caplog.text


@pytest.mark.parametrize("queries", [[300], [0, 128, 1, 129, 0], [5] * 40, [3, 200, 0] * 50])
@pytest.mark.parametrize("shared", [False, True])
def test_list_of_work(queries, shared):
    """Items of every sequence, without those that have no heads to attend for."""
    batch = len(queries)
    tables = random_membership(9, 3, 1 if shared else 4)
    rows = None if shared else torch.randint(0, 4, (batch,), dtype=torch.int32)
    chunks = chunks_of(tables.to(DEVICE), 2)
    starts = torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE)
    got = plan(chunks, starts, None if rows is None else rows.to(DEVICE), 128)
    used = (chunks.slot >= 0).sum(1).cpu()
    lines = torch.zeros(batch, dtype=torch.long) if rows is None else rows.long()
    items = -(-torch.tensor(queries) // 128) * used[lines]
    assert got.tolist() == [0, *items.cumsum(0).tolist(), 0]
    # a row's chunks with work are its first
    assert (chunks.slot >= 0).int().diff(dim=1).max() <= 0
