"""Prefill of packed sequences with an exact window against the definition, head by head."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops import AttentionCall, PackedQueries, PagedKV, Probe, checks
from chai_attention.ops.fp8 import FLOAT8
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.windowed import head_offsets
from helpers import random_membership
from local_cases import local_pages, packed_recent_definition
from op_calls import dispatched
from packed_cases import packed_case

# heads, K/V heads, clusters, streaming heads
SHAPES = [(5, 5, 2, 0), (6, 6, 2, 3), (4, 4, 0, 4), (6, 3, 2, 2), (8, 2, 3, 5), (6, 3, 0, 6)]
QUERIES, CONTEXTS = [5, 1, 0, 9, 3, 1], [0, 20, 0, 17, 40, 3]


def run(
    member, queries, contexts, *, recent=6, sinks=2, local_page=16, page=16, probe_end=0,
    softcap=None, ids=None, tables=None, dtype=torch.float64, stored=None,
):  # fmt: skip
    """What `paged_prefill` gives and what it should; ``tables[ids]`` is ``member``, if given."""
    case = packed_case(
        member, queries, contexts, page, 8, 12, dtype, "cpu", tail=2, stored_dtype=stored
    )
    local = local_pages(member, case.caches, queries, local_page, recent, sinks)
    table = torch.randn(member.heads, member.heads)
    probe = Probe(case.query, case.key, case.value, probe_end) if probe_end else None
    got, lse = dispatched.paged_prefill(
        case.query, case.caches.keys, case.caches.values, case.caches.table, tables or member,
        query_starts=case.starts, lengths=case.caches.lengths, most_queries=max(queries),
        scale=0.3, softcap=softcap, probe=probe, ids=ids, local=local,
        offset=head_offsets(table, member),
    )  # fmt: skip
    assert lse is None
    want = packed_recent_definition(case, member, 0.3, recent, sinks, table, softcap, probe_end)
    return got[: sum(queries)], want


@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "streaming"), SHAPES)
@pytest.mark.parametrize("local_page", [1, 5, 16, 48])
def test_pages_are_the_definition(heads, kv_heads, clusters, streaming, local_page):
    member = random_membership(heads, clusters, len(QUERIES), kv_heads, streaming)
    assert_close(*run(member, QUERIES, CONTEXTS, local_page=local_page, softcap=5.0))


@pytest.mark.parametrize(("recent", "sinks"), [(1, 0), (1, 4), (30, 4), (100, 1), (7, 9)])
def test_windows_shorter_and_longer_than_prompts(recent, sinks):
    member = random_membership(6, 2, len(QUERIES), streaming=2)
    assert_close(*run(member, QUERIES, CONTEXTS, recent=recent, sinks=sinks))


@pytest.mark.parametrize("probe_end", [1, 4, 30])
def test_first_tokens_of_fresh_prompts_see_everything(probe_end):
    member = random_membership(6, 2, 4, streaming=1)
    got, want = run(
        member, [30, 3, 12, 20], [0, 0, 0, 9], recent=4, sinks=1, probe_end=probe_end
    )  # fmt: skip
    assert_close(got, want)


def test_rows_of_tables():
    tables = random_membership(6, 2, 4, streaming=2)
    ids = torch.tensor([3, 0, 3, 1, 1, 2], dtype=torch.int32)
    got, want = run(tables.select(ids.long()), QUERIES, CONTEXTS, tables=tables, ids=ids)
    assert_close(got, want)


def test_pages_of_8_bits():
    member = random_membership(6, 2, len(QUERIES), 3, streaming=2)
    got, want = run(member, QUERIES, CONTEXTS, dtype=torch.float32, stored=FLOAT8)
    assert_close(got.double(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "streaming"), SHAPES)
@pytest.mark.parametrize(("recent", "sinks"), [(1, 0), (6, 2), (40, 4)])
def test_packed_prompts_are_the_definition(heads, kv_heads, clusters, streaming, recent, sinks):
    tables = random_membership(heads, clusters, 3, kv_heads, streaming)
    ids = torch.tensor([2, 0, 2, 2, 1], dtype=torch.int32)
    member = tables.select(ids.long())
    queries = [5, 1, 0, 23, 3]
    case = packed_case(member, queries, [0] * 5, 16, 8, 12, torch.float64, "cpu", tail=2)
    table = torch.randn(heads, heads)
    got, _ = dispatched.varlen_prefill(
        case.query, case.key, case.value, tables, query_starts=case.starts, most_queries=23,
        scale=0.3, ids=ids, natural_order=True, recent=recent, sinks=sinks, softcap=4.0,
        offset=head_offsets(table, member), probe=Probe(case.query, case.key, case.value, 3),
    )  # fmt: skip
    want = packed_recent_definition(case, member, 0.3, recent, sinks, table, 4.0, 3)
    assert_close(got[:32], want)


def test_sequences_without_tokens_get_zeros():
    """Rows of padding in a batch of fixed size: no pages, length 0."""
    member = random_membership(4, 2, 2, streaming=1)
    case = packed_case(member, [1, 3], [20, 0], 16, 8, 8, torch.float64, "cpu")
    local = local_pages(member, case.caches, [1, 3], 16, 4, 1)
    lengths = case.caches.lengths.clone()
    lengths[0] = 0
    got, _ = dispatched.paged_prefill(
        case.query, case.caches.keys, case.caches.values, case.caches.table, member,
        query_starts=case.starts, lengths=lengths, most_queries=3, scale=0.3, local=local,
        offset=head_offsets(None, member),
    )  # fmt: skip
    assert torch.equal(got[0], torch.zeros(4, 8, dtype=torch.float64))
    assert_close(got[1:], packed_recent_definition(case, member, 0.3, 4, 1)[1:])


def test_a_window_that_does_not_fit_is_refused():
    member = random_membership(4, 2, 1, streaming=1)
    case = packed_case(member, [3], [5], 16, 8, 8, torch.float32, "cpu")
    caches, local = case.caches, local_pages(member, case.caches, [3], 16, 4, 1)
    offset = head_offsets(None, member)
    options = {
        "query_starts": case.starts, "lengths": caches.lengths, "most_queries": 3, "scale": 1.0,
    }  # fmt: skip

    def call(query=case.query, local=local, offset=offset, member=member, **more):
        dispatched.paged_prefill(
            query, caches.keys, caches.values, caches.table, member, local=local, offset=offset,
            **options, **more,
        )  # fmt: skip

    with pytest.raises(ValueError, match="stream need a recent window"):
        call(local=None)
    with pytest.raises(ValueError, match="stream need an offset"):
        call(offset=None)
    with pytest.raises(ValueError, match="query of all heads"):
        call(query=case.query[:, :2])
    with pytest.raises(ValueError, match="no log-sum-exp"):
        call(return_lse=True)
    with pytest.raises(ValueError, match=r"offset has shape \[4\]"):
        call(offset=offset[0])
    for name in ("key", "value"):
        wrong = {name: getattr(local, name)[:, :, :0]}
        with pytest.raises(ValueError, match=f"window.{name} has shape"):
            call(local=replace(local, **wrong))
    with pytest.raises(ValueError, match="local pages are of"):
        call(local=replace(local, key=local.key.half(), value=local.value.half()))
    plain = Membership.identity(4)
    with pytest.raises(ValueError, match="offset belongs"):
        dispatched.varlen_prefill(
            case.query, case.key, case.value, plain, query_starts=case.starts, most_queries=3,
            scale=1.0, offset=offset,
        )  # fmt: skip
    with pytest.raises(ValueError, match="natural order"):
        dispatched.varlen_prefill(
            case.query, case.key, case.value, plain, query_starts=case.starts, most_queries=3,
            scale=1.0, recent=4,
        )  # fmt: skip


def test_pages_that_are_shared_are_refused_for_another_membership():
    member, other = random_membership(6, 2, 1), random_membership(6, 3, 1)
    table, starts = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    sizes = (member.kept_keys, member.kept_values, 6 - member.kept_keys, 6 - member.kept_values)
    key, value, *near = (torch.zeros(2, 16, n, 8) for n in sizes)
    queries = PackedQueries(torch.zeros(3, 6, 8), starts, 3)
    shared = {}

    def check(member, table):
        local = LocalPages(*near, table, 4, 1)
        pages = PagedKV(key, value, table, torch.tensor([3]), local, shared=shared)
        checks.check_paged_prefill(queries, pages, AttentionCall(member, 0.3), None)

    check(member, table)
    check(member, table)
    with pytest.raises(AttentionInputError, match="key has shape"):
        check(other, table)
    with pytest.raises(AttentionInputError, match="block_table has shape"):
        check(member, table.repeat(2, 1))
