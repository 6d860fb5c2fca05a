"""Kernels over 8-bit pages, on a GPU if there is one, else interpreted."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from chai_attention.ops import cache_write
from chai_attention.ops.narrow import FLOAT8, widen_pages
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.triton import widen, write
from helpers import random_membership
from op_calls import dispatched, kernels
from packed_cases import packed_case
from paged_caches import paged_caches

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# the interpreter multiplies bfloat16 matrices wrongly
PRODUCTS = (torch.float32, torch.bfloat16 if CUDA else torch.float16)
SHAPES = [(9, 9, 4, 48, 16), (12, 12, 1, 64, 32), (32, 32, 5, 128, 16), (9, 3, 4, 80, 64)]


@pytest.fixture(autouse=True)
def _nan_memory(nan_memory):
    """Fresh memory holds NaN."""


def double(x):
    return x.cpu().double()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "dim", "page"), SHAPES)
def test_decode(heads, kv_heads, clusters, dim, page, dtype):
    lengths = [1, 63, 0, 129]
    member = random_membership(heads, clusters, 4, kv_heads)
    case = paged_caches(member, lengths, page, dim, 40, dtype, DEVICE, stored=FLOAT8)
    query = torch.randn(4, heads, dim, dtype=dtype, device=DEVICE)
    want, _ = dispatched.paged_decode(
        double(query), double(case.keys), double(case.values), case.table.cpu(), member,
        lengths=case.lengths.cpu(), scale=dim**-0.5,
    )  # fmt: skip
    got, _ = kernels.paged_decode(
        query, case.keys, case.values, case.table, member.to(DEVICE), lengths=case.lengths,
        scale=dim**-0.5,
    )  # fmt: skip
    assert got.dtype == dtype
    assert_close(double(got), want, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "dim", "page"), SHAPES)
def test_prefill_behind_a_context(heads, kv_heads, clusters, dim, page, dtype):
    queries, contexts = [70, 1, 33], [40, 128, 0]
    member = random_membership(heads, clusters, 3, kv_heads)
    case = packed_case(
        member, queries, contexts, page, dim, dim, dtype, DEVICE, stored_dtype=FLOAT8
    )
    options = {"most_queries": 70, "scale": dim**-0.5}
    caches = case.caches
    want, _ = dispatched.paged_prefill(
        double(case.query), double(caches.keys), double(caches.values), caches.table.cpu(), member,
        query_starts=case.starts.cpu(), lengths=caches.lengths.cpu(), **options,
    )  # fmt: skip
    out = torch.full((sum(queries), heads, dim), torch.nan, dtype=dtype, device=DEVICE)
    kernels.paged_prefill(
        case.query, caches.keys, caches.values, caches.table, member.to(DEVICE), out,
        query_starts=case.starts, lengths=caches.lengths, **options,
    )  # fmt: skip
    assert_close(double(out), want, atol=TOLERANCE[dtype], rtol=0)


def rounded_down(*shape, scale):
    """Numbers a little larger than 8-bit ones, of which none is smaller than normal.

    The interpreter rounds others wrongly: upwards in the middle, and 1.99 to 1.
    """
    near = torch.randn(*shape).clamp(-3, 3).to(FLOAT8).float()
    near = torch.where(near.abs() < 2.0**-6, 0.0, near)
    return near * (1.01 + 0.01 * torch.rand(shape)) * scale


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 7.0)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_write_rounds_like_the_reference(dtype, scales):
    heads, dim, page, tokens = 5, 48, 16, 40
    member = random_membership(heads, 2)
    key, value = (rounded_down(tokens, heads, dim, scale=scale).to(dtype) for scale in scales)
    key[3, 0, 5], key[4, 1, 6] = 1e4, -1e4
    if CUDA:
        key[5:9], value[0] = torch.randn(4, heads, dim).to(dtype), 2.0**-9 * 1.5
    position = torch.arange(tokens)
    slots = torch.where(position == 11, -1, position + 3)
    near_slots = torch.where(position == 13, -1, position + 5)
    results = []
    for function, device in ((write.write_paged, DEVICE), (cache_write.write_paged, "cpu")):
        pages = [torch.zeros(3, page, n, dim, device=device).to(FLOAT8) for n in (2, heads)]
        near = NearPages(
            torch.zeros(3, page, heads - 2, dim, device=device).to(FLOAT8),
            torch.zeros(3, page, 0, dim, device=device).to(FLOAT8),
            torch.zeros(1, 1, dtype=torch.int32), 8, 2,
        )  # fmt: skip
        function(
            key.to(device), value.to(device), *pages, slots.to(device), member.to(device), None,
            near, near_slots.to(device), scales,
        )  # fmt: skip
        results.append([x.view(torch.uint8) for x in (*pages, near.key)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("one_buffer", [False, True])
def test_copies_of_pages(dtype, one_buffer):
    case = paged_caches(
        random_membership(5, 2), [100], 16, 48, 40, dtype, DEVICE, one_buffer, FLOAT8
    )  # fmt: skip
    used = torch.tensor([5, 0, 5, 2], device=DEVICE)
    for pages in (case.keys, case.values):
        raw, results = pages.view(torch.uint8), []
        raw[(raw & 0x7F) == 0x7F] = 0  # the interpreter takes NaN for a number
        for function, device in ((widen.widen_pages, DEVICE), (widen_pages, "cpu")):
            out = torch.full((4, *pages.shape[1:]), torch.nan, dtype=dtype, device=device)
            function(pages.to(device), used.to(device), out)
            results.append(out.cpu())
        want = pages.cpu().to(dtype)[used.cpu()]
        for got in results:
            assert torch.equal(got, want)
