"""Decode over pages on the CPU against attention computed head by head, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from chai_attention.errors import AttentionInputError
from chai_attention.ops.local_pages import LocalPages
from helpers import definition, random_membership
from op_calls import dispatched
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
        got, _ = dispatched.paged_decode(
            part, case.keys, case.values, case.table, member, out=out, **options
        )
        assert got is out
        for row, length in enumerate(lengths):
            want = definition(
                query[row, None, :, None], case.full_keys[row][None], case.full_values[row][None],
                member.representatives[row, None], 0.3, softcap=2.0,
            )[0, 0]  # fmt: skip
            assert_close(got[row], want if length else torch.zeros_like(want))


def test_what_does_not_fit_is_refused():
    member = random_membership(6, 2, 2)
    case = paged_caches(member, [5, 9], 8, 16, 16, torch.float32, "cpu")
    query = torch.randn(2, 6, 16)
    local = LocalPages(
        torch.zeros(2, 16, 4, 16), torch.zeros(2, 16, 0, 16), torch.tensor([[0], [1]]).int(), 3, 1
    )

    def call(query=query, keys=case.keys, table=case.table, member=member, **options):
        options = {"lengths": case.lengths, "scale": 0.3, **options}
        dispatched.paged_decode(query, keys, case.values, table, member, **options)

    call(local=local)
    for error, options in {
        "neither of all 6 nor of the 2": {"query": query[:, :3]},
        "needs the query of all heads": {"query": query[:, :2], "local": local},
        "has no log-sum-exp": {"local": local, "return_lse": True},
        "offset belongs to a recent window": {"offset": torch.zeros(2, 6)},
        "need membership_ids": {"member": random_membership(6, 2, 3)},
        "key_pages has shape": {"keys": case.keys[:, :, :1]},
        "block_table has shape": {"table": case.table[:1]},
        "seq_lens has shape": {"lengths": case.lengths[:1]},
        "out has shape": {"out": torch.zeros(2, 6, 8)},
        "seq_lens is on meta": {"lengths": case.lengths.to("meta")},
    }.items():
        with pytest.raises(AttentionInputError, match=error):
            call(**options)
