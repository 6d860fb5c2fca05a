"""Rows that change, by the kernel: all tables are those that PyTorch makes, in place."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from chai_attention.membership import Membership
from chai_attention.ops.membership_tables import MembershipTables
from chai_attention.ops.triton import membership_tables as kernels
from chai_attention.ops.triton.head_tiles import head_tiles_of, natural_head_tiles
from chai_attention.ops.windowed import head_offsets
from helpers import random_representatives

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLES = (
    "slot_heads", "key_heads", "value_heads", "value_slot", "key_slot", "removed_key_heads",
    "removed_value_heads", "key_place", "value_place", "slot", "order", "offsets",
)  # fmt: skip
ROWS = 6


def tables_of(member: Membership) -> dict[object, Tensor]:
    """Everything that was made of a membership, by where it is."""
    found: dict[object, Tensor] = {}
    for part, name in ((member, "all"), (member.far, "far")):
        if part is not None:
            tables = {
                key: x
                for key, x in vars(part).items()
                if isinstance(x, Tensor) and not key.startswith("_")
            }
            found |= {(name, key): table for key, table in tables.items()}
    for key, held in member.derived.items():
        found |= {
            (*key, field.name): x
            for field in fields(held)
            if isinstance(x := getattr(held, field.name), Tensor)
        }
    return found


def made(representatives, clusters, kv_heads, kept, streaming, sizes) -> Membership:
    member = Membership.from_representatives(
        representatives, clusters, kv_heads, kept, streaming
    )  # fmt: skip
    for name in TABLES:
        if not (streaming and name in kernels.WITHOUT_STREAMING):
            getattr(member, name)
    for size in sizes:
        head_tiles_of(member, size)
        natural_head_tiles(member, size)
    return member


@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "kept", "streaming"),
    [
        (9, 9, 4, 4, ()), (5, 5, 1, 1, ()), (40, 40, 7, 7, ()), (12, 4, 5, 4, ()),
        (12, 6, 2, 3, ()), (8, 4, 4, 4, ()), (9, 9, 3, 3, (0, 4, 8)), (12, 4, 3, 3, (3, 4, 5)),
        (8, 4, 2, 2, (0, 1, 4, 5)), (6, 6, 4, 4, (1, 2)), (32, 32, 8, 8, tuple(range(20, 32))),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("is_part", "has_offsets"), [(False, True), (True, False)])
def test_rows_by_the_kernel(
    heads, kv_heads, clusters, kept, streaming, is_part, has_offsets, monkeypatch
) -> None:
    monkeypatch.setattr(Membership, "known_rows", None)  # as on a GPU
    far = [head for head in range(heads) if head not in streaming]

    def random(count: int) -> tuple[Tensor, Tensor]:
        """Among the heads that do not stream, by their numbers there, and of all heads."""
        inner = random_representatives(len(far), clusters, count)
        every = torch.arange(heads).repeat(count, 1)
        every[:, far] = torch.tensor(far)[inner]
        return inner, every

    sizes, offsets = (1, 4), torch.randn(heads, heads) if has_offsets else None
    before = random(ROWS)[1]
    member = made(before.to(DEVICE), clusters, kv_heads, kept, streaming, sizes)
    held = tables_of(member)
    changing = MembershipTables(
        member, None if offsets is None else offsets.to(DEVICE), has_offsets or bool(streaming),
        tuple(far) if is_part else None,
    )  # fmt: skip
    inner, every = random(3)
    changed = torch.tensor([4, 0, 3], dtype=torch.int32)
    listed = kernels.list_tables(member, changing.offset, changing._offsets)
    assert listed is not None
    kernels.put_tables(
        member, listed, changed.to(DEVICE), (inner if is_part else every).to(DEVICE), changing._part
    )
    after = before.clone()
    after[changed.long()] = every
    wanted = made(after, clusters, kv_heads, kept, streaming, sizes)
    now, want = tables_of(member), tables_of(wanted)
    assert now.keys() == want.keys()
    for name, table in now.items():
        assert table is held[name], name
        assert torch.equal(table.cpu(), want[name]), name
    if changing.offset is not None:
        torch.testing.assert_close(changing.offset.cpu(), head_offsets(offsets, wanted))


def test_one_membership_for_many_rows() -> None:
    member = made(torch.zeros(4, 5, dtype=torch.long, device=DEVICE), 1, 5, 1, (), (2,))
    listed = kernels.list_tables(member)
    assert listed is not None
    ids = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    kernels.put_tables(member, listed, ids, torch.full((1, 5), 2, device=DEVICE), None)
    assert member.representatives[:, 0].tolist() == [0, 2, 0, 2]
    assert member.slot_heads.tolist() == [[0], [2], [0], [2]]


def test_tables_that_the_kernel_does_not_know_are_left_to_pytorch() -> None:
    def member(**options) -> Membership:
        return Membership.from_representatives(torch.tensor([[0, 1, 0, 3]] * 3), 2, **options)

    streaming = member(streaming=(3,))
    assert kernels.list_tables(streaming) is not None
    assert streaming.order is not None
    assert kernels.list_tables(streaming) is None
    # with grouped queries a streaming head beside one that sees far keys
    assert kernels.list_tables(member(streaming=(3,), kv_heads=2, kept_keys=2)) is None
    other = member(streaming=(3,))
    other.__dict__["something"] = torch.zeros(3, 2)
    assert kernels.list_tables(other) is None
