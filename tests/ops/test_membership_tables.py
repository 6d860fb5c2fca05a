"""Rows of a membership that change while its tables are in use."""

import pytest
import torch

from chai_attention.membership import Membership
from chai_attention.ops.membership_tables import update_tables

REPS = ((0, 0, 2, 2, 0, 2), (0, 0, 0, 0, 0, 5), (0, 1, 1, 1, 1, 1), (3, 3, 3, 3, 4, 4))
# heads 1 and 4 stream; with grouped queries 1 and, as a whole K/V head, 4 and 5
STREAMING_REPS = ((0, 1, 0, 3, 4, 3), (2, 1, 2, 3, 4, 3), (0, 1, 0, 5, 4, 5), (2, 1, 2, 5, 4, 5))
GROUPED_REPS = ((0, 1, 0, 3, 4, 5), (2, 1, 2, 3, 4, 5), (3, 1, 2, 3, 4, 5), (0, 1, 2, 2, 4, 5))
TABLES = ("slot", "slot_heads", "order", "offsets", "key_heads", "key_slot", "value_heads",
          "value_slot", "removed_key_heads", "key_place", "removed_value_heads", "value_place",
          "streams", "far_place")  # fmt: skip


def members(reps, kv_heads: int, streaming=()) -> Membership:
    return Membership.from_representatives(torch.tensor(reps), 2, kv_heads, 2, streaming)


@pytest.mark.parametrize(
    ("reps", "kv_heads", "streaming"),
    [(REPS, 6, ()), (REPS, 3, ()), (STREAMING_REPS, 6, (1, 4)), (GROUPED_REPS, 3, (1, 4, 5))],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_tables_follow_in_place(reps, kv_heads: int, streaming, size: int) -> None:
    head_tiles = pytest.importorskip("chai_attention.ops.triton.head_tiles")
    # a table for whatever comes, as on a GPU, where nobody knows what the rows will be
    member = members((reps[0],) * 5, kv_heads, streaming)
    held = []
    for make in (head_tiles.head_tiles_of, head_tiles.natural_head_tiles):
        unknown = Membership.known_rows
        try:
            Membership.known_rows = None
            held.append((make, make(member, size)))
        finally:
            Membership.known_rows = unknown
    far = member.far
    tables = {(part, name): getattr(part, name) for part in (member, far) for name in TABLES}
    assert member.host_rows == (reps[0],) * 5
    update_tables(member, torch.tensor([4, 1, 2]), members(reps[1:], kv_heads, streaming))
    rows = (reps[0], reps[2], reps[3], reps[0], reps[1])
    assert member.host_rows == rows
    fresh = members(rows, kv_heads, streaming)
    assert member.far is far
    for (part, name), table in tables.items():
        assert getattr(part, name) is table
        assert torch.equal(table, getattr(fresh if part is member else fresh.far, name)), name
    for make, made in held:
        assert make(member, size) is made
        wanted = make(fresh, size)
        for name in ("slot", "query", "key", "head", "value"):
            table, count = getattr(made, name), wanted.count
            assert torch.equal(table[:, :count], getattr(wanted, name)), name
            spare = table[:, count:]
            assert bool((spare == (table[0, -1] if spare.numel() == 0 else -1)).all()), name
