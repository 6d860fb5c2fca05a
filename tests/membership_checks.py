"""Comparing memberships that a kernel made, tables included, with those PyTorch makes."""

import torch

from chai_attention.membership import Membership
from chai_attention.ops.triton.head_tiles import head_tiles_of

TABLES = (
    "representatives", "slot", "value_slot", "order", "slot_heads", "offsets", "key_heads",
    "key_slot", "key_place", "removed_key_heads", "value_heads",
)  # fmt: skip


def assert_same_membership(got: Membership, want: Membership, members: tuple[int, ...] = ()):
    """All tables; and those of chunks of each of the sizes ``members``."""
    numbers = [(each.clusters, each.kv_heads, each.kept_keys) for each in (got, want)]
    assert numbers[0] == numbers[1]
    for name in TABLES:
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    for count in members:
        mine, its = head_tiles_of(got, count), head_tiles_of(want, count)
        spare = mine.count - its.count  # on the CPU it is known how many chunks there are
        for name in ("slot", "query", "key", "head", "value"):
            table = getattr(its, name)
            padding = (0, 0, 0, spare) if table.ndim == 3 else (0, spare)
            table = torch.nn.functional.pad(table, padding, value=-1)
            assert torch.equal(getattr(mine, name).cpu(), table), name
