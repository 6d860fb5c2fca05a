"""Decode over pages on the CPU against attention computed head by head, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from chai_attention.errors import AttentionInputError
from chai_attention.ops.cache_write import write_paged
from chai_attention.ops.paged import paged_decode
from chai_attention.ops.ring import NearRing
from chai_attention.ops.windowed import head_offsets
from helpers import definition, random_membership, recent_definition
from paged_caches import paged_caches

SHAPES = [(9, 9, 4), (12, 12, 12), (9, 3, 2)]


@pytest.mark.parametrize("one_buffer", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), SHAPES)
def test_pages_are_the_definition(heads, kv_heads, clusters, one_buffer):
    lengths, dim = [1, 0, 19, 40], 16
    member = random_membership(heads, clusters, 4, kv_heads)
    case = paged_caches(member, lengths, 8, dim, 24, torch.float64, "cpu", one_buffer)
    query = torch.randn(4, heads, dim, dtype=torch.float64)
    options = {"lengths": case.lengths, "scale": 0.3, "softcap": 2.0}
    own = query.gather(1, member.slot_heads[:, :, None].expand(-1, -1, dim))
    for part in (query, own):
        out = torch.full((4, heads, 24), torch.nan, dtype=torch.float64)
        got, _ = paged_decode(part, case.keys, case.values, case.table, member, out=out, **options)
        assert got is out
        for row, length in enumerate(lengths):
            want = definition(
                query[row, None, :, None], case.full_keys[row][None], case.full_values[row][None],
                member.representatives[row, None], 0.3, softcap=2.0,
            )[0, 0]  # fmt: skip
            assert_close(got[row], want if length else torch.zeros_like(want))


@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), [(6, 6, 2), (6, 2, 1)])
def test_window_over_pages_filled_by_writes(heads, kv_heads, clusters):
    """Tokens come one by one; sequences have rows of the tables and of the ring's memories."""
    lengths, dim, page, recent, sinks = [3, 30, 9], 16, 8, 6, 2
    tables = random_membership(heads, clusters, 5, kv_heads)
    rows, slots = torch.tensor([4, 0, 4]), torch.tensor([1, 3, 0])
    removed = kv_heads - tables.kept_keys
    near = NearRing(
        torch.full((4, removed, recent + 1, dim), torch.nan, dtype=torch.float64),
        torch.full((4, removed, sinks, dim), torch.nan, dtype=torch.float64),
        torch.tensor([[0, 1], [0, 1], [7, 8], [0, 1]], dtype=torch.int32),
        recent,
        begin=2,
    )
    case = paged_caches(tables.select(rows), lengths, page, dim, dim, torch.float64, "cpu")
    pages = [torch.full_like(x, torch.nan) for x in (case.keys, case.values)]
    for step in range(max(lengths)):
        going = [row for row, length in enumerate(lengths) if step < length]
        key, value = (
            torch.stack([full[row][:, step] for row in going])
            for full in (case.full_keys, case.full_values)
        )
        write_paged(
            key, value, *pages, case.table[going, step // page].long() * page + step % page,
            tables, rows[going].int(), near, torch.full((len(going),), step), slots[going].int(),
        )  # fmt: skip
    for got, want in zip(pages, (case.keys, case.values), strict=True):
        assert_close(got, want, equal_nan=True, rtol=0, atol=0)
    query = torch.randn(3, heads, dim, dtype=torch.float64)
    offsets = torch.randn(heads, heads, dtype=torch.float64)
    got, _ = paged_decode(
        query, *pages, case.table, tables, lengths=case.lengths, scale=0.3, rows=rows.int(),
        near=near, slots=slots.int(), offset=head_offsets(offsets, tables.select(rows)),
    )  # fmt: skip
    for row in range(3):
        want = recent_definition(
            query[row, None, :, None], case.full_keys[row][None], case.full_values[row][None],
            tables.representatives[rows[row], None], 0.3, recent, sinks, offsets,
        )  # fmt: skip
        assert_close(got[row], want[0, 0])


def test_what_does_not_fit_is_refused():
    member = random_membership(6, 2, 2)
    case = paged_caches(member, [5, 9], 8, 16, 16, torch.float32, "cpu")
    query = torch.randn(2, 6, 16)
    ring = NearRing(
        torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 1, 16), torch.zeros(2, 1, dtype=torch.int32), 3
    )

    def call(query=query, keys=case.keys, table=case.table, member=member, **options):
        options = {"lengths": case.lengths, "scale": 0.3, **options}
        paged_decode(query, keys, case.values, table, member, **options)

    call(near=ring)
    for error, options in {
        "neither of all 6 nor of the 2": {"query": query[:, :3]},
        "needs the query of all heads": {"query": query[:, :2], "near": ring},
        "has no log-sum-exp": {"near": ring, "return_lse": True},
        "belong to a recent window": {"offset": torch.zeros(2, 6)},
        "need rows": {"member": random_membership(6, 2, 3)},
        "key_pages has shape": {"keys": case.keys[:, :, :1]},
        "block_table has shape": {"table": case.table[:1]},
        "lengths has shape": {"lengths": case.lengths[:1]},
        "out has shape": {"out": torch.zeros(2, 6, 8)},
        "near.ring has shape": {"near": NearRing(ring.ring[:1], *ring_rest(ring))},
        "lengths is on meta": {"lengths": case.lengths.to("meta")},
    }.items():
        with pytest.raises(AttentionInputError, match=error):
            call(**options)


def ring_rest(near):
    return near.sinks, near.sink_positions, near.recent
