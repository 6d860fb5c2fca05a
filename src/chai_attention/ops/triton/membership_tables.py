"""Changes rows of a membership in all of its tables, in one launch.

A list on the device says which tables there are and where. A program writes one row of one table:
from each head's representative it computes, as `Membership` and `head_tiles` do, the head's
cluster, its places in the caches and its head tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from chai_attention.index_tables import table_of
from chai_attention.membership import Membership
from chai_attention.ops.triton.head_tiles import _deal, _deal_natural
from chai_attention.ops.triton.sizes import power_of_2

WARPS = {16: 1, 32: 2, 64: 4, 128: 8}  # by heads, padded
MAX_HEADS = 128
FIELDS = tl.constexpr(5)  # of an entry: kind, width of a row, first column, members, address

# kinds of tables: those of a membership, the same of its far heads, those of head tiles
NAMES = (
    "representatives", "slot", "order", "slot_heads", "key_slot", "offsets", "key_heads",
    "removed_key_heads", "key_place", "value_heads", "value_slot", "value_place",
)  # fmt: skip
FAR = tl.constexpr(16)
HEAD_TILES = tl.constexpr(32)
HEAD_TILE_FIELDS = ("slot", "query", "key", "head", "value")
NATURAL = {"key": 5, "value": 6}  # behind `HEAD_TILES`
HEAD_OFFSETS = tl.constexpr(48)
# of all heads, if some stream: what nothing that attends reads
WITHOUT_STREAMING = ("slot", "order", "offsets")


@triton.jit
def _rank(of, among):
    """How many of ``among`` stand before each of ``of``: ``[HP]`` int32."""
    head = tl.arange(0, among.shape[0])
    return tl.sum(((head[None, :] < of[:, None]) & among[None, :]).to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["heads", "clusters", "kept", "stride_rep"])
def _put(
    rep_ptr, ids_ptr, inside_ptr, outside_ptr, sees_ptr, list_ptr, shift_ptr,
    heads, clusters, kept, stride_rep,
    GROUP: tl.constexpr, HP: tl.constexpr, IS_PART: tl.constexpr, HAS_STREAMING: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """One row of one table.

    With ``IS_PART`` the representatives are those of some heads, numbered among themselves:
    ``inside_ptr`` has each head's number there, or -1, and ``outside_ptr`` the way back.
    """
    new = tl.program_id(0)
    entry = list_ptr + tl.program_id(1) * FIELDS
    kind, width = tl.load(entry).to(tl.int32), tl.load(entry + 1).to(tl.int32)
    first, members = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32)
    address = tl.load(entry + 4)
    start = tl.load(ids_ptr + new).to(tl.int64) * width
    head = tl.arange(0, HP)
    real = head < heads
    if IS_PART:
        inside = tl.load(inside_ptr + head, mask=real, other=-1)
        rep = tl.load(rep_ptr + new * stride_rep + tl.maximum(inside, 0), mask=real, other=0)
        rep = tl.load(outside_ptr + rep, mask=real, other=0)
        rep = tl.where(inside < 0, head, rep).to(tl.int32)
    else:
        rep = tl.load(rep_ptr + new * stride_rep + head, mask=real, other=HP).to(tl.int32)
    sees = real
    if HAS_STREAMING:
        sees = (tl.load(sees_ptr + head, mask=real, other=0) != 0) & real
    chosen = (rep == head) & sees

    # ---- of every head: its cluster, its place among the heads in the order of clusters
    slot = tl.where(sees, _rank(rep, chosen), HP)
    lower = slot[None, :] < slot[:, None]
    same = (slot[None, :] == slot[:, None]) & sees[None, :]
    size = tl.maximum(tl.sum(same.to(tl.int32), axis=1), 1)
    within = tl.sum((same & (head[None, :] < head[:, None])).to(tl.int32), axis=1)
    place = tl.sum(lower.to(tl.int32), axis=1) + within
    seen_before = _rank(head, sees)
    # ---- of every K/V head: whether it is kept, and its places; of every head: where it reads
    groups = heads // GROUP
    is_group = head < groups
    if GROUP == 1:
        needed = chosen
        held = sees
        key = slot
        value = tl.where(sees, place, seen_before + head * 0)
        held_before = seen_before
    else:
        reads = head[None, :] // GROUP == head[:, None]
        needed = tl.sum((reads & chosen[None, :]).to(tl.int32), axis=1) > 0
        held = tl.sum((reads & sees[None, :]).to(tl.int32), axis=1) > 0
        # filled up with the lowest that are not needed
        spare = held & (needed == 0)
        missing = kept - tl.sum(needed.to(tl.int32))
        needed = needed | (spare & (_rank(head, spare) < missing))
        held_before = _rank(head, held)
        key = _rank(rep // GROUP, needed)
        value = _rank(head // GROUP, held)
    kept_values = tl.sum(held.to(tl.int32))
    kept_before = _rank(head, needed)

    what = rep
    at = head
    use = real
    if kind < HEAD_TILES:
        far = kind >= FAR
        kind = kind % FAR
        number = tl.where(far, seen_before, head)
        counted = tl.where(far, sees, real)
        group = tl.where(far, held_before, head)
        is_counted = tl.where(far, held, is_group)
        at, use = number, counted
        if kind == 0:
            what = tl.where(far, _rank(rep, sees), rep)
        elif kind == 1:
            what = slot
        elif kind == 2:
            what, at, use = number, place, sees
        elif kind == 3:
            what, at, use = number, slot, chosen
        elif kind == 4:
            what, at, use = key, slot, chosen
        elif kind == 5:
            # cluster c begins behind the heads of all slots before it; the last entry is all
            what = tl.sum((slot[None, :] < head[:, None]).to(tl.int32), axis=1)
            at, use = head, head < clusters
            table = address.to(tl.pointer_type(tl.int64)) + start
            tl.store(table + clusters, tl.sum(sees.to(tl.int64)))
        elif kind == 6:
            what, at, use = group, kept_before, needed
        elif kind == 7:
            what, at, use = group, group - kept_before, is_counted & (needed == 0)
        elif kind == 8:
            what = tl.where(needed, kept_before, kept + group - kept_before)
            at, use = group, is_counted
        elif kind == 9:
            if GROUP == 1:
                what, at, use = number, place, sees
            else:
                what, at, use = group, held_before, held
        elif kind == 10:
            if GROUP == 1:
                what = tl.where(sees, place, kept_values + head - seen_before)
            else:
                what = tl.where(sees, value, kept_values + head // GROUP - value)
        else:
            if GROUP == 1:
                what = tl.where(sees, place, kept_values + head - seen_before)
            else:
                what = tl.where(held, held_before, kept_values + head - held_before)
            at, use = group, is_counted
        table = address.to(tl.pointer_type(tl.int64)) + start
        tl.store(table + at, what.to(tl.int64), mask=use)
    elif kind < HEAD_OFFSETS:
        kind -= HEAD_TILES
        # head tiles of a cluster are of equal size but for one
        count = (size + members - 1) // members
        part = within * count // size
        lane = within - (part * size + count - 1) // count
        opens = (lane == 0) & sees
        head_tile = tl.sum((lower & opens[None, :]).to(tl.int32), axis=1) + part
        at, use = first + head_tile, opens
        if (kind == 3) | (kind == 4) | (kind == 6):
            at, use = first + head_tile * members + lane, sees
        if kind == 0:
            what = slot
        elif kind == 1:
            what = rep
        elif kind == 2:
            what = key
        elif kind == 3:
            what = head
        elif kind == 4:
            what = value
        elif kind == 5:
            what = rep // GROUP
        else:
            what = head // GROUP
        numbers = address.to(tl.pointer_type(tl.int32)) + start
        for column in range(first, width, HP):
            tl.store(numbers + column + head, -1, mask=column + head < width)
        tl.debug_barrier()  # other threads of the program write over it
        tl.store(numbers + at, what.to(tl.int32), mask=use)
    else:
        shift = tl.zeros([HP], dtype=tl.float32)
        if HAS_SHIFT:
            other = sees & (rep != head)
            shift = tl.load(shift_ptr + head * heads + rep, mask=other, other=0.0)
        shift = tl.where(sees, shift, float("-inf"))
        tl.store(address.to(tl.pointer_type(tl.float32)) + start + head, shift, mask=real)


@dataclass(frozen=True, eq=False)
class TableList:
    """All tables of a membership that have rows of their own, as `_put` takes them.

    Attributes:
        entries: ``[n, 5]`` int64 on the device.
        sees: ``[H]`` int64, 0 for heads that stream; None if none does.
        shift: ``[H, H]`` float32 of `windowed.head_offsets`, or None.
    """

    entries: Tensor
    sees: Tensor | None
    shift: Tensor | None


def list_tables(
    membership: Membership, offset: Tensor | None = None, offsets: Tensor | None = None
) -> TableList | None:
    """List what `put_tables` has to write.

    Args:
        membership: of R rows.
        offset: ``[R, H]`` float32, `windowed.head_offsets` of it, which changes too; or None.
        offsets: ``[H, H]`` float32 of which that is made; None for zeros.

    Returns:
        None where the kernel does not know one of the tables; PyTorch knows all of them.
    """
    heads, streaming = membership.heads, membership.streaming
    alone = tuple(head for head in range(heads) if head not in membership.far_heads)
    if heads > MAX_HEADS or streaming != alone:
        return None
    found = list(_entries(membership))
    if offset is not None:
        found.append((HEAD_OFFSETS.value, offset, 0, 1))
    if any(entry is None or not entry[1].is_contiguous() for entry in found):
        return None
    device = membership.representatives.device
    numbers = [
        (kind, table.stride(0), first, members, table.data_ptr())
        for kind, table, first, members in (entry for entry in found if entry is not None)
    ]
    sees = None
    if streaming:
        sees = table_of(tuple(int(head not in streaming) for head in range(heads)), device)
    return TableList(torch.tensor(numbers, dtype=torch.long, device=device), sees, offsets)


_Entry = tuple[int, Tensor, int, int]


def _entries(membership: Membership) -> Iterator[_Entry | None]:
    """Kind, table, first column and members of all tables; None for one of an unknown kind."""
    far = membership.__dict__.get("far")
    parts = [(membership, 0)]
    if far is not None and far is not membership:
        parts.append((far, FAR.value))
    for part, base in parts:
        for name in [name for name in vars(part) if name.startswith("_")]:
            del vars(part)[name]  # a step on the way to others, which is found again from the rows
        for name, table in vars(part).items():
            # what is the same for all rows is one row or an expanded one
            if not isinstance(table, Tensor) or table.ndim < 2 or not table.stride(0):
                continue
            known = name in NAMES and not (part.streaming and name in WITHOUT_STREAMING)
            known = known and table.dtype == torch.long
            yield (base + NAMES.index(name), table, 0, 1) if known else None
        for (make, *arguments), head_tiles in part.derived.items():
            if make not in (_deal, _deal_natural) or part is not membership:
                yield None
                continue
            [members] = arguments
            for field in HEAD_TILE_FIELDS:
                table = getattr(head_tiles, field)
                kind = HEAD_TILE_FIELDS.index(field)
                if make is _deal_natural:
                    if field not in NATURAL:
                        continue  # a table of `_deal`, which is listed
                    kind = NATURAL[field]
                if table.numel():
                    wide = members if table.ndim == 3 else 1
                    yield HEAD_TILES.value + kind, table, head_tiles.streaming * wide, members


def put_tables(
    membership: Membership,
    tables: TableList,
    ids: Tensor,
    representatives: Tensor,
    part: tuple[Tensor, Tensor] | None,
) -> None:
    """`ops.membership_tables.MembershipTables.put` in one launch; nothing is read on the host."""
    heads = membership.heads
    padded = max(16, power_of_2(heads))
    inside, outside = (None, None) if part is None else part
    _put[(ids.shape[0], tables.entries.shape[0])](
        representatives, ids, inside, outside, tables.sees, tables.entries, tables.shift,
        heads, membership.clusters, membership.kept_keys,
        representatives.stride(0) if representatives.shape[0] > 1 else 0,
        GROUP=membership.group_size, HP=padded, IS_PART=part is not None,
        HAS_STREAMING=tables.sees is not None, HAS_SHIFT=tables.shift is not None,
        num_warps=WARPS[padded],
    )  # fmt: skip
