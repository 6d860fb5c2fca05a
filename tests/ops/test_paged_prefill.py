"""Prefill of packed sequences on the CPU against the definition, head by head."""

import pytest
import torch
from torch.testing import assert_close

from chai_attention.ops import Probe
from helpers import random_membership
from op_calls import dispatched
from packed_cases import packed_case, packed_definition, stored

SHAPES = [(5, 5, 2), (6, 3, 3), (4, 4, 4)]
QUERIES, CONTEXTS = [5, 1, 0, 9, 3], [0, 20, 0, 17, 0]


@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), SHAPES)
@pytest.mark.parametrize("probe_end", [0, 4])
@pytest.mark.parametrize("every_head", [False, True])
def test_pages_are_the_definition(heads, kv_heads, clusters, probe_end, every_head):
    member = random_membership(heads, clusters, 5, kv_heads)
    case = packed_case(member, QUERIES, CONTEXTS, 16, 8, 12, torch.float64, "cpu", tail=2)
    probe = Probe(case.query, case.key, case.value, probe_end) if probe_end else None
    query = case.query
    if not every_head:
        line = torch.repeat_interleave(torch.arange(5), torch.tensor(QUERIES))
        line = torch.cat([line, torch.tensor([0, 0])])
        query = query.gather(1, member.slot_heads[line][:, :, None].expand(-1, -1, 8))
    got, lse = dispatched.paged_prefill(
        query, case.caches.keys, case.caches.values, case.caches.table, member,
        query_starts=case.starts, lengths=case.caches.lengths, most_queries=9, scale=0.3,
        softcap=5.0, probe=probe, return_lse=True,
    )  # fmt: skip
    want = packed_definition(case, member.representatives, 0.3, 5.0, probe_end)
    assert_close(got[:18], want)
    assert lse.shape == (20, clusters)


@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), SHAPES)
@pytest.mark.parametrize("natural", [False, True])
def test_packed_prompts_are_the_definition(heads, kv_heads, clusters, natural):
    tables = random_membership(heads, clusters, 3, kv_heads)
    ids = torch.tensor([2, 0, 2, 2, 1], dtype=torch.int32)
    member = tables.select(ids.long())
    case = packed_case(member, QUERIES, [0] * 5, 16, 8, 12, torch.float64, "cpu", tail=2)
    key, value = (case.key, case.value) if natural else stored(case, member)
    got, _ = dispatched.varlen_prefill(
        case.query, key, value, tables, query_starts=case.starts, most_queries=9, scale=0.3,
        ids=ids, natural_order=natural, probe=Probe(case.query, case.key, case.value, 3),
    )  # fmt: skip
    assert_close(got[:18], packed_definition(case, member.representatives, 0.3, probe_end=3))


def test_sequences_without_tokens():
    member = random_membership(4, 2, 1)
    case = packed_case(member.expand(2), [0, 3], [0, 0], 16, 8, 8, torch.float64, "cpu")
    pages = (case.caches.keys, case.caches.values, case.caches.table)
    got, lse = dispatched.paged_prefill(
        torch.cat([case.query[:1], case.query]), *pages, member,
        query_starts=torch.tensor([0, 1, 4], dtype=torch.int32),
        lengths=torch.tensor([0, 3], dtype=torch.int32), most_queries=3, scale=0.3,
        return_lse=True,
    )  # fmt: skip
    assert torch.equal(got[0], torch.zeros(4, 8, dtype=torch.float64))
    assert (lse[0] == -torch.inf).all()
    want = packed_definition(case, member.expand(2).representatives, 0.3)
    assert_close(got[1:], want)


def test_what_does_not_fit_is_refused():
    member = random_membership(4, 2, 1)
    case = packed_case(member, [3], [0], 16, 8, 8, torch.float32, "cpu")
    options = {"query_starts": case.starts, "most_queries": 3, "scale": 1.0}
    key, value = stored(case, member)
    with pytest.raises(ValueError, match="neither of all 4"):
        dispatched.varlen_prefill(case.query[:, :3], key, value, member, **options)
    with pytest.raises(ValueError, match="K has 4 heads"):
        dispatched.varlen_prefill(case.query, case.key, value, member, **options)
    with pytest.raises(ValueError, match="V has 2 heads"):
        dispatched.varlen_prefill(case.query, key, value[:, :2], member, **options)
    with pytest.raises(ValueError, match="need membership_ids"):
        dispatched.varlen_prefill(case.query, key, value, member.expand(3), **options)
    with pytest.raises(ValueError, match="a probe needs"):
        dispatched.varlen_prefill(
            case.query, key, value, member, probe=Probe(case.query, key, value, 3), **options
        )
    pages = case.caches.keys[:, :8], case.caches.values[:, :8], case.caches.table
    with pytest.raises(ValueError, match="multiple of 16"):
        dispatched.paged_prefill(case.query, *pages, member, lengths=case.caches.lengths, **options)
