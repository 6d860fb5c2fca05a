"""Decode over far and local pages on the CPU against attention computed head by head."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops.fp8 import FLOAT8
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.windowed import head_offsets
from helpers import random_membership
from local_pages_cases import case_definition, local_case
from op_calls import dispatched
from page_writes import write_paged

# heads, K/V heads, clusters, streaming heads
HEADS = [(6, 6, 2, 0), (9, 9, 3, 4), (5, 5, 0, 5), (6, 2, 1, 0), (9, 3, 2, 5), (6, 3, 0, 6),
         (6, 6, 4, 2), (6, 6, 6, 0)]  # fmt: skip
# far and local page, w, s: sinks over pages, windows longer than a page and than the sequence
WINDOWS = [(16, 48, 9, 4), (64, 48, 5, 0), (48, 16, 40, 20), (16, 16, 1, 1), (32, 64, 200, 2)]
LENGTHS = [70, 0, 3, 129, 9]


def attend(case, query, member, offsets, tables=None, ids=None, **options):
    got, lse = dispatched.paged_decode(
        query, *case.pages, case.table, tables or member, lengths=case.lengths, local=case.local,
        offset=head_offsets(offsets, member), ids=ids, **options,
    )  # fmt: skip
    assert lse is None
    return got


@pytest.mark.parametrize(("page", "local_page", "recent", "sinks"), WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "streaming"), HEADS)
def test_local_pages_are_the_definition(
    heads, kv_heads, clusters, streaming, page, local_page, recent, sinks
):
    """Pages before the window hold NaN, and their number is none."""
    member = random_membership(heads, clusters, len(LENGTHS), kv_heads, streaming)
    case = local_case(
        member, LENGTHS, write_paged, page=page, local_page=local_page, recent=recent, sinks=sinks,
        dim=16, value_dim=24, dtype=torch.float64,
    )  # fmt: skip
    query = torch.randn(len(LENGTHS), heads, 16, dtype=torch.float64)
    offsets = torch.randn(heads, heads, dtype=torch.float64)
    out = torch.full((len(LENGTHS), heads, 24), torch.nan, dtype=torch.float64)
    got = attend(case, query, member, offsets, scale=0.3, softcap=2.0, out=out)
    assert got is out
    assert_close(got, case_definition(case, query, member, 0.3, offsets, softcap=2.0))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "streaming"), [(6, 6, 2, 2), (6, 2, 1, 2), (6, 2, 1, 0)]
)
def test_tokens_come_one_by_one_and_sequences_have_rows_of_the_tables(
    heads, kv_heads, clusters, streaming
):
    tables = random_membership(heads, clusters, 5, kv_heads, streaming)
    ids = torch.tensor([4, 0, 4])
    member = tables.select(ids)
    case = local_case(
        tables, [3, 30, 50], write_paged, page=8, local_page=16, recent=6, sinks=2, dim=16,
        value_dim=16, dtype=torch.float64, ids=ids, steps=True,
    )  # fmt: skip
    query = torch.randn(3, heads, 16, dtype=torch.float64)
    got = attend(case, query, member, None, tables, ids.int(), scale=0.3)
    assert_close(got, case_definition(case, query, member, 0.3, None))


def test_one_membership_for_all():
    member = random_membership(9, 2, 1, 3, 4)
    case = local_case(
        member, [20, 41], write_paged, page=16, local_page=16, recent=4, sinks=1, dim=8,
        value_dim=8, dtype=torch.float64,
    )  # fmt: skip
    query, two = torch.randn(2, 9, 8, dtype=torch.float64), member.expand(2)
    got = attend(case, query, two, None, member, scale=0.3)
    assert_close(got, case_definition(case, query, two, 0.3, None))


@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "streaming"), HEADS[:6])
def test_pages_of_eight_bits(heads, kv_heads, clusters, streaming):
    member = random_membership(heads, clusters, 3, kv_heads, streaming)
    case = local_case(
        member, [70, 5, 100], write_paged, page=64, local_page=48, recent=9, sinks=4, dim=16,
        value_dim=16, dtype=torch.float64, stored=FLOAT8,
    )  # fmt: skip
    query = torch.randn(3, heads, 16, dtype=torch.float64)
    got = attend(case, query, member, None, scale=0.3)
    assert got.dtype == torch.float64
    assert_close(got, case_definition(case, query, member, 0.3, None))


def test_eight_bits_are_written_by_their_scales():
    member = random_membership(6, 2, 1, streaming=2)
    sizes = (member.kept_keys, member.kept_values, 6 - member.kept_keys, 6 - member.kept_values)
    keys, values, local_key, local_value = (torch.zeros(1, 16, n, 8).to(FLOAT8) for n in sizes)
    local = LocalPages(local_key, local_value, torch.zeros(1, 1, dtype=torch.int32), 4, 0)
    key, value = torch.randn(2, 3, 6, 8)
    write_paged(
        key, value, keys, values, torch.tensor([1, -1, 2]), member, local=local,
        local_slot_mapping=torch.tensor([5, 6, -1]), scales=(0.5, 4.0),
    )  # fmt: skip
    heads = member.removed_key_heads[0], member.removed_value_heads[0]
    assert torch.equal(local_key[0, 5].float(), (key[0, heads[0]] / 0.5).to(FLOAT8).float())
    assert torch.equal(local_value[0, 6].float(), (value[1, heads[1]] / 4).to(FLOAT8).float())
    assert torch.equal(keys[0, 2].float(), (key[2, member.key_heads[0]] / 0.5).to(FLOAT8).float())
    assert not bool(local_key[0, 7:].float().any())
    assert not bool(values[0, 3:].float().any())


def test_what_does_not_fit_is_refused():
    member = Membership.from_representatives(torch.tensor([[0, 0, 2, 3]] * 2), streaming=[3])
    case = local_case(
        member, [20, 41], write_paged, page=16, local_page=16, recent=4, sinks=1, dim=8,
        value_dim=8, dtype=torch.float32,
    )  # fmt: skip
    local, query, offset = case.local, torch.randn(2, 4, 8), head_offsets(None, member)

    def call(query=query, local=local, **options):
        options = {"lengths": case.lengths, "scale": 0.3, "offset": offset, **options}
        dispatched.paged_decode(query, *case.pages, case.table, member, local=local, **options)

    def other(**parts):
        return replace(local, **parts)

    call()
    for error, options in {
        "streaming heads need a recent window": {"local": None, "offset": None},
        "a recent window and an offset": {"offset": None},
        "needs the query of all heads": {"query": query[:, :2]},
        "window.key has shape": {"local": other(key=local.key[:, :, :1])},
        "window.value has shape": {"local": other(value=local.value[:, :, :0])},
        "window.block_table has shape": {"local": other(block_table=local.block_table[:1])},
        "window.block_table is on meta": {"local": other(block_table=local.block_table.to("meta"))},
        "need one dtype": {"local": other(key=local.key.half())},
        "window of 0": {"local": other(recent=0)},
    }.items():
        with pytest.raises(AttentionInputError, match=error):
            call(**options)
    key = torch.randn(1, 4, 8)
    slot = torch.zeros(1, dtype=torch.long)
    for options in (
        {}, {"local": local}, {"local": other(value=local.key), "local_slot_mapping": slot},
    ):  # fmt: skip
        with pytest.raises(AttentionInputError, match="local pages or places"):
            write_paged(key, key, *case.pages, slot, member.select(slot), **options)
