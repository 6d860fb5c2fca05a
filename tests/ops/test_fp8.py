"""8-bit pages on the CPU: what is read back, and attention to it head by head."""

import pytest
import torch
from torch.testing import assert_close

from chai_attention.errors import AttentionInputError
from chai_attention.ops.fp8 import FLOAT8, as_stored, narrow
from chai_attention.ops.local_pages import LocalPages
from helpers import definition, random_membership, recent_definition
from op_calls import dispatched
from page_writes import write_paged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_with_four_bits_are_kept_and_large_ones_bounded(dtype):
    exact = torch.tensor([0.0, -1.0, 1.875, 448.0, -(2.0**-9), 0.4375], dtype=dtype)
    assert torch.equal(as_stored(exact), exact)
    assert as_stored(torch.tensor([1e4, -460.0], dtype=dtype)).tolist() == [448.0, -448.0]
    assert as_stored(torch.tensor([1.0 + 1 / 16 + 1 / 64], dtype=dtype)).item() == 1.125
    assert as_stored(torch.tensor([900.0], dtype=dtype), 4.0).item() == 224.0
    assert narrow(exact).dtype == FLOAT8
    assert narrow(torch.tensor([torch.nan], dtype=dtype)).isnan().all()


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 3.0)])
@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), [(6, 6, 2), (6, 2, 1)])
def test_pages_that_were_written_are_the_definition(heads, kv_heads, clusters, scales):
    length, dim, page, recent, sinks = 30, 16, 16, 6, 2
    member = random_membership(heads, clusters, 1, kv_heads)
    pages = [
        torch.full((4, page, n, dim), torch.nan).to(FLOAT8) for n in (member.kept_keys, kv_heads)
    ]
    local = LocalPages(
        torch.full((4, page, kv_heads - member.kept_keys, dim), torch.nan).to(FLOAT8),
        torch.zeros(4, page, 0, dim).to(FLOAT8),
        torch.tensor([[1, 3]], dtype=torch.int32), recent, sinks,
    )  # fmt: skip
    key, value = torch.randn(2, length, kv_heads, dim, dtype=torch.float64)
    position = torch.arange(length)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    slots = table[0, position // page].long() * page + position % page
    local_slots = local.block_table[0, position // page].long() * page + position % page
    stored = torch.empty_like(key), torch.empty_like(value)
    write_paged(key, value, *pages, slots, member, None, local, local_slots, scales, stored)
    for got, states, scale in zip(stored, (key, value), scales, strict=True):
        assert torch.equal(got, as_stored(states, scale))
    query = torch.randn(1, heads, dim, dtype=torch.float64)
    # keys and values as they are after rounding, at their own size
    keys = (as_stored(key, scales[0]) * scales[0]).transpose(0, 1)[None]
    values = (as_stored(value, scales[1]) * scales[1]).transpose(0, 1)[None]
    rep = member.representatives
    options = {"lengths": torch.tensor([length], dtype=torch.int32), "scale": 0.3 * scales[0]}
    got, _ = dispatched.paged_decode(query, *pages, table, member, **options)
    want = definition(query[:, :, None], keys, values, rep, 0.3)[:, 0]
    assert got.dtype == torch.float64
    assert_close(got * scales[1], want)
    many = torch.randn(5, heads, dim, dtype=torch.float64)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    got, _ = dispatched.paged_prefill(
        many, *pages, table, member, query_starts=starts, most_queries=5, **options
    )
    want = definition(many.transpose(0, 1)[None], keys, values, rep, 0.3)[0]
    assert_close(got * scales[1], want)
    got, _ = dispatched.paged_decode(query, *pages, table, member, local=local, **options)
    want = recent_definition(query[:, :, None], keys, values, rep, 0.3, recent, sinks, None)[:, 0]
    assert_close(got * scales[1], want)


def test_scales_and_rounded_numbers_need_pages_of_eight_bits():
    member = random_membership(4, 2)
    pages = [torch.zeros(2, 16, n, 8) for n in (2, 4)]
    key = torch.zeros(1, 4, 8)
    with pytest.raises(AttentionInputError, match="scales"):
        write_paged(key, key, *pages, torch.zeros(1).long(), member, scales=(0.5, 1.0))
    with pytest.raises(AttentionInputError, match="memory for rounded ones"):
        write_paged(key, key, *pages, torch.zeros(1).long(), member, stored=(key, key))
    narrow_pages = [each.to(FLOAT8) for each in pages]
    for wrong in (key.half(), key[:, :2]):
        with pytest.raises(AttentionInputError, match="do not fit"):
            write_paged(key, key, *narrow_pages, torch.zeros(1).long(), member, stored=(key, wrong))
    with pytest.raises(AttentionInputError, match="cannot take"):
        write_paged(key, key, pages[0].to(FLOAT8), pages[1], torch.zeros(1).long(), member)
