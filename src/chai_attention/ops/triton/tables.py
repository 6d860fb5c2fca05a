"""The tables of a membership that was found on the GPU, written by the program that found it.

Made in PyTorch, the tables that attention reads take dozens of launches. Here the representatives
are still in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from chai_attention.membership import Membership
from chai_attention.ops.triton.head_tiles import HeadTiles, adopt_head_tiles


@jit
def write_tables(
    rep, long_ptr, first_ptr, second_ptr, row, batch, head, heads, clusters, kept,
    first_members, first_count, second_members, second_count,
    GROUP: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """Write everything of `Memory` for the sequence ``row``."""
    real = head < heads
    before_head = head[None, :] < head[:, None]
    chosen = (rep == head) & real
    # of every head: its cluster, the K that the cluster reads, its place within the cluster
    slot = tl.sum(((head[None, :] < rep[:, None]) & chosen[None, :]).to(tl.int32), axis=1)
    slot = tl.where(real, slot, HP)
    lower = slot[None, :] < slot[:, None]
    same = (slot[None, :] == slot[:, None]) & real[None, :]
    size = tl.maximum(tl.sum(same.to(tl.int32), axis=1), 1)
    inside = tl.sum((same & before_head).to(tl.int32), axis=1)
    place = tl.sum(lower.to(tl.int32), axis=1) + inside
    if GROUP == 1:
        needed = chosen
        key, value = slot, place
    else:  # K/V heads that a representative reads
        reads = (head[None, :] // GROUP == head[:, None]) & chosen[None, :]
        needed = tl.sum(reads.to(tl.int32), axis=1) > 0
        earlier = head[None, :] < (rep // GROUP)[:, None]
        key = tl.sum((earlier & needed[None, :]).to(tl.int32), axis=1)
        value = head // GROUP
    groups = heads // GROUP
    is_group = head < groups
    kept_before = tl.sum((before_head & needed[None, :]).to(tl.int32), axis=1)
    removed_before = head - kept_before
    key_place = tl.where(needed, kept_before, kept + removed_before)

    # one table after the other, as `Memory` has them
    at = long_ptr
    start = row * heads
    tl.store(at + start + head, rep.to(tl.int64), mask=real)
    at += batch * heads
    tl.store(at + start + head, slot.to(tl.int64), mask=real)
    at += batch * heads
    tl.store(at + start + head, value.to(tl.int64), mask=real)
    at += batch * heads
    tl.store(at + start + place, head.to(tl.int64), mask=real)
    at += batch * heads
    tl.store(at + row * clusters + slot, head.to(tl.int64), mask=chosen)
    at += batch * clusters
    tl.store(at + row * clusters + slot, key.to(tl.int64), mask=chosen)
    at += batch * clusters
    # cluster c begins behind the heads of all slots before it; the last entry is all heads
    behind = tl.sum((slot[None, :] < head[:, None]).to(tl.int32), axis=1)
    tl.store(at + row * (clusters + 1) + head, behind.to(tl.int64), mask=head < clusters)
    tl.store(at + row * (clusters + 1) + clusters, heads.to(tl.int64))
    at += batch * (clusters + 1)
    tl.store(at + row * groups + head, key_place.to(tl.int64), mask=is_group)
    at += batch * groups
    tl.store(at + row * kept + kept_before, head.to(tl.int64), mask=is_group & needed)
    at += batch * kept
    tl.store(
        at + row * (groups - kept) + removed_before, head.to(tl.int64),
        mask=is_group & (needed == 0),
    )  # fmt: skip
    _write_head_tiles(
        first_ptr, rep, slot, key, value, size, inside, lower, row, batch, head, real,
        first_members, first_count, HP,
    )  # fmt: skip
    if second_count > 0:
        _write_head_tiles(
            second_ptr, rep, slot, key, value, size, inside, lower, row, batch, head, real,
            second_members, second_count, HP,
        )  # fmt: skip


@jit
def _write_head_tiles(
    int_ptr, rep, slot, key, value, size, inside, lower, row, batch, head, real, members, count,
    HP: tl.constexpr,
):  # fmt: skip
    """Write the tables of `HeadTiles`: all -1, then what is used, as `head_tiles_of` deals."""
    tiles, lanes = batch * count, batch * count * members
    for first in range(0, count, HP):
        at = first + head
        for table in tl.static_range(3):
            tl.store(int_ptr + table * tiles + row * count + at, -1, mask=at < count)
    by_lane = int_ptr + 3 * tiles + row * count * members
    for first in range(0, count * members, HP):
        at = first + head
        for table in tl.static_range(2):
            tl.store(by_lane + table * lanes + at, -1, mask=at < count * members)
    tl.debug_barrier()  # other threads of the program write over it
    # head tiles of a cluster are of equal size but for one
    needed = (size + members - 1) // members
    part = inside * needed // size
    inside -= (part * size + needed - 1) // needed
    # a head that stands first in its head tile counts that head tile
    opens = (inside == 0) & real
    head_tile = tl.sum((lower & opens[None, :]).to(tl.int32), axis=1) + part
    at = row * count + head_tile
    tl.store(int_ptr + at, slot, mask=opens)
    tl.store(int_ptr + tiles + at, rep, mask=opens)
    tl.store(int_ptr + 2 * tiles + at, key, mask=opens)
    at = at * members + inside
    tl.store(int_ptr + 3 * tiles + at, head, mask=real)
    tl.store(int_ptr + 3 * tiles + lanes + at, value, mask=real)


@dataclass(frozen=True)
class Memory:
    """What `write_tables` writes, and the membership that reads it.

    Attributes:
        tables: int64, the tables of the membership.
        first: int32, its head tiles of one size.
        second: int32, its head tiles of another size; the first again where both are equal.
        membership: not to be read before the kernel is launched.
        sizes: the integers of `write_tables` from ``clusters`` on, in its order.
    """

    tables: Tensor
    first: Tensor
    second: Tensor
    membership: Membership
    sizes: tuple[int, ...]


def table_memory(
    batch: int,
    heads: int,
    clusters: int,
    kv_heads: int,
    kept: int,
    members: tuple[int, int] | None,
    device: torch.device,
) -> Memory:
    """Memory for the tables of ``batch`` memberships.

    Args:
        batch: B.
        heads: H.
        clusters: k.
        kv_heads: G.
        kept: K/V heads that the representatives of every sequence read.
        members: two sizes of head tiles; None for representatives alone.
        device: where.
    """
    if members is None:
        rep = torch.empty(batch, heads, dtype=torch.long, device=device)
        found = Membership(rep, clusters, kv_heads, kept)
        return Memory(rep, rep, rep, found, (clusters, kept, 1, 0, 1, 0))
    widths = (
        heads, heads, heads, heads, clusters, clusters, clusters + 1, kv_heads, kept,
        kv_heads - kept,
    )  # fmt: skip
    names = (
        "slot", "value_slot", "order", "slot_heads", "key_slot", "offsets", "key_place",
        "key_heads", "removed_key_heads",
    )  # fmt: skip
    memory = torch.empty(batch * sum(widths), dtype=torch.long, device=device)
    parts = memory.split([batch * width for width in widths])
    tables = [part.view(batch, width) for part, width in zip(parts, widths, strict=True)]
    made = dict(zip(names, tables[1:], strict=True))
    membership = Membership.from_tables(tables[0], clusters, kv_heads, kept, **made)
    head_tiles, sizes = {}, [clusters, kept]
    for each in members:
        count = clusters + (heads - clusters) // each
        sizes += [each, 0 if each in head_tiles else count]
        if each not in head_tiles:
            head_tiles[each] = _head_tile_memory(batch, count, each, membership)
    first, second = (head_tiles[each] for each in members)
    return Memory(memory, first, second, membership, tuple(sizes))


def _head_tile_memory(batch: int, count: int, members: int, membership: Membership) -> Tensor:
    """Memory for `_write_head_tiles`, which `head_tiles_of` will find."""
    tiles, lanes = batch * count, batch * count * members
    memory = torch.empty(
        3 * tiles + 2 * lanes, dtype=torch.int32, device=membership.representatives.device
    )
    slot, query, key, head, value = memory.split([tiles, tiles, tiles, lanes, lanes])
    shape = (batch, count)
    head_tiles = HeadTiles(
        slot.view(shape), query.view(shape), key.view(shape),
        head.view(*shape, members), value.view(*shape, members),
    )  # fmt: skip
    adopt_head_tiles(membership, head_tiles)
    return memory
