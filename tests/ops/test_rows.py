"""Rows of a membership that change while its tables are in use."""

import pytest
import torch

from chai_attention.membership import Membership
from chai_attention.ops.rows import update_rows

REPS = ((0, 0, 2, 2, 0, 2), (0, 0, 0, 0, 0, 5), (0, 1, 1, 1, 1, 1), (3, 3, 3, 3, 4, 4))
TABLES = ("slot", "slot_heads", "order", "offsets", "key_heads", "key_slot", "value_heads",
          "value_slot", "removed_key_heads", "key_place")  # fmt: skip


def members(reps, kv_heads: int) -> Membership:
    return Membership.from_representatives(torch.tensor(reps), 2, kv_heads, 2)


@pytest.mark.parametrize("kv_heads", [6, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_tables_follow_in_place(kv_heads: int, size: int) -> None:
    chunks = pytest.importorskip("chai_attention.ops.triton.chunks")
    packed = pytest.importorskip("chai_attention.ops.triton.paged_prefill")
    # a table for whatever comes, as on a GPU, where nobody knows what the rows will be
    member = members((REPS[0],) * 5, kv_heads)
    held = []
    for make in (chunks.chunks_of, packed.natural_chunks):
        unknown = Membership.known_rows
        try:
            Membership.known_rows = None
            held.append((make, make(member, size)))
        finally:
            Membership.known_rows = unknown
    tables = {name: getattr(member, name) for name in TABLES}
    assert member.host_rows == (REPS[0],) * 5
    update_rows(member, torch.tensor([4, 1, 2]), members(REPS[1:], kv_heads))
    rows = (REPS[0], REPS[2], REPS[3], REPS[0], REPS[1])
    assert member.host_rows == rows
    fresh = members(rows, kv_heads)
    for name, table in tables.items():
        assert getattr(member, name) is table
        assert torch.equal(table, getattr(fresh, name)), name
    for make, made in held:
        assert make(member, size) is made
        wanted = make(fresh, size)
        for name in ("slot", "query", "key", "head", "value"):
            table, count = getattr(made, name), wanted.count
            assert torch.equal(table[:, :count], getattr(wanted, name)), name
            spare = table[:, count:]
            assert bool((spare == (table[0, -1] if spare.numel() == 0 else -1)).all()), name
