"""How heads are dealt out to programs: head tiles of a few members of one cluster.

A program computes the probabilities of one cluster once and applies them to the V of up to M
members. How many head tiles a row needs depends on its membership. If that is known on the device
only, the grid is sized for the worst case, and programs without a head tile return at once.
Streaming heads stand in head tiles of their own, before the others: they share no scores.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.triton.repeated import Launches
from chai_attention.ops.triton.sizes import cdiv


@dataclass(frozen=True)
class HeadTiles:
    """Work of every program of one batch row; -1 marks what is not used.

    Attributes:
        slot: ``[B, N]`` int32, the cluster of each head tile; -1 for one of streaming heads.
        query: ``[B, N]`` int32, the representative head of that cluster.
        key: ``[B, N]`` int32, the place in the K cache that the cluster reads.
        head: ``[B, N, M]`` int32, the heads whose outputs the head tile writes.
        value: ``[B, N, M]`` int32, the place in the V cache of each of them; behind those of the
            cache for V heads that it does not hold (`Membership.value_slot`).
        exact: whether some row has work for all N head tiles, and not just the worst row there is.
        streaming: how many head tiles, the first ones, see local keys only.
    """

    slot: Tensor
    query: Tensor
    key: Tensor
    head: Tensor
    value: Tensor
    exact: bool = False
    streaming: int = 0

    @cached_property
    def count(self) -> int:
        """N, the number of head tiles a row can have."""
        return self.slot.shape[1]

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All five, in the order that kernels take them."""
        return self.slot, self.query, self.key, self.head, self.value

    @cached_property
    def members(self) -> int:
        """M, the most heads that a head tile can have."""
        return self.head.shape[2]

    @cached_property
    def stride(self) -> int:
        """From a sequence's row to the next one's: 0 if all share one."""
        return 0 if self.slot.shape[0] == 1 else 1

    def far_of_a_row(self, member: Membership) -> int:
        """How many head tiles of a row see far keys, known without a look at the device.

        Of those that are known there only, as many as clusters of equal size have.
        """
        if self.exact:
            return self.count - self.streaming
        return max(member.clusters, cdiv(len(member.far_heads), self.members))

    @cached_property
    def launches(self) -> Launches:
        """Launches over these tables, by what else they are compiled for."""
        return Launches()

    @cached_property
    def used(self) -> tuple[Tensor, Tensor]:
        """Which head tiles have work, as indices into ``[B * N]``: those first, and their number.

        ``[B * N]`` and ``[1]`` int32. Streaming head tiles stand behind the others: they are short,
        and fill the gaps that long work leaves at its end.
        """
        size, first = self.slot.numel(), self.head[:, :, 0].contiguous()
        memory = torch.empty(size + 1, dtype=torch.int32, device=self.slot.device)
        work, count = memory[:size], memory[size:]
        _list_used[(1,)](
            first, work, count, size, self.count, self.streaming, BLOCK=1024, num_warps=4
        )
        return work, count


@triton.jit(do_not_specialize=["size", "head_tiles", "streaming"])
def _list_used(head_ptr, work_ptr, count_ptr, size, head_tiles, streaming, BLOCK: tl.constexpr):
    """List the head tiles with work, streaming ones behind the others, then the rest."""
    used = 0
    long = 0  # head tiles with work that do not stream
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        busy = tl.load(head_ptr + i, mask=i < size, other=-1) >= 0
        used += tl.sum(busy.to(tl.int32))
        long += tl.sum((busy & (i % head_tiles >= streaming)).to(tl.int32))
    tl.store(count_ptr, used)
    before = 0  # head tiles with work that stand before
    long_before = 0
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        busy = (tl.load(head_ptr + i, mask=i < size, other=-1) >= 0).to(tl.int32)
        is_long = tl.where(i % head_tiles >= streaming, busy, 0)
        rank = before + tl.cumsum(busy) - busy
        long_rank = long_before + tl.cumsum(is_long) - is_long
        before += tl.sum(busy)
        long_before += tl.sum(is_long)
        place = tl.where(is_long > 0, long_rank, long + rank - long_rank)
        tl.store(work_ptr + tl.where(busy > 0, place, used + i - rank), i, mask=i < size)


def heads_per_tile(heads: int, clusters: int, columns: int) -> int:
    """Members of a head tile whose program has room for the V of ``columns`` of them.

    Lanes that no member fills are wasted, so head tiles are no wider than clusters are on average.
    ``heads`` are those that see far keys; without any, ``clusters`` is 0.
    """
    if not clusters:
        return 1
    most = 1 << (-(-heads // clusters) - 1).bit_length()
    return min(most, max(1, columns))


def head_tiles_of(membership: Membership, members: int) -> HeadTiles:
    """Return the head tiles of up to ``members`` heads; nothing is read on the host."""
    return membership.derive(_deal, members)


def adopt_head_tiles(membership: Membership, head_tiles: HeadTiles) -> None:
    """Remember head tiles that were made together with the membership."""
    membership.derived[_deal, head_tiles.head.shape[2]] = head_tiles


def _deal(membership: Membership, members: int) -> HeadTiles:
    """Head tiles of the heads that see far keys, behind those of heads that do not."""
    if not membership.streaming:
        return _deal_clusters(membership, members)
    batch, device = membership.batch, membership.representatives.device
    alone = sorted(set(range(membership.heads)) - set(membership.far_heads))
    count = -(-len(alone) // members)
    heads = torch.tensor(alone, dtype=torch.long, device=device)

    def room(width: int) -> Tensor:
        return torch.full((batch, width), -1, dtype=torch.int32, device=device)

    head, value = room(count * members), room(count * members)
    head[:, : len(alone)] = heads.int()
    value[:, : len(alone)] = membership.value_slot[:, heads].int()
    head, value = (x.view(batch, count, members) for x in (head, value))
    none = room(count)
    if membership.far is None:
        return HeadTiles(none, none, none, head, value, exact=True, streaming=count)
    far = _deal_clusters(membership.far, members)
    natural = torch.tensor(membership.far_heads, dtype=torch.int32, device=device)

    def named(heads: Tensor) -> Tensor:
        return torch.where(heads < 0, heads, natural[heads.clamp_min(0)])

    return HeadTiles(
        slot=torch.cat([none, far.slot], 1),
        query=torch.cat([none, named(far.query)], 1),
        key=torch.cat([none, far.key], 1),
        head=torch.cat([head, named(far.head)], 1),
        value=torch.cat([value, far.value], 1),
        exact=far.exact,
        streaming=count,
    )


def _deal_clusters(membership: Membership, members: int) -> HeadTiles:
    """Deal the heads of each cluster, in order, into as few head tiles as ``members`` allows.

    Head tiles of a cluster are of equal size but for one, so that programs take equally long.
    """
    batch, heads, clusters = membership.batch, membership.heads, membership.clusters
    device = membership.representatives.device
    # a cluster of n heads needs 1 + (n - 1) // members head tiles
    rows = membership.known_rows
    count = clusters + (heads - clusters) // members
    if rows is not None:
        count = max(sum(cdiv(n, members) for n in Counter(row).values()) for row in set(rows))
    order = membership.order  # [B, H]
    slot = membership.slot.gather(1, order)  # [B, H], ascending
    offsets = membership.offsets
    place = torch.arange(heads, device=device) - offsets.gather(1, slot)
    size = offsets.diff(dim=1)  # [B, k]
    needed = (size + members - 1) // members
    first = needed.cumsum(1) - needed
    size, needed = size.gather(1, slot), needed.gather(1, slot)  # [B, H]
    part = place * needed // size
    head_tile = first.gather(1, slot) + part
    lane = head_tile * members + place - (part * size + needed - 1) // needed

    def table(size: int, index: Tensor, source: Tensor) -> Tensor:
        empty = torch.full((batch, size), -1, dtype=torch.int32, device=device)
        return empty.scatter_(1, index, source.int())

    value = membership.value_slot.gather(1, order)
    return HeadTiles(
        slot=table(count, head_tile, slot),
        query=table(count, head_tile, membership.slot_heads.gather(1, slot)),
        key=table(count, head_tile, membership.key_slot.gather(1, slot)),
        head=table(count * members, lane, order).view(batch, count, members),
        value=table(count * members, lane, value).view(batch, count, members),
        exact=rows is not None,
    )


def natural_head_tiles(membership: Membership, members: int) -> HeadTiles:
    """`head_tiles_of`, but for K and V of all K/V heads in their natural order."""
    return membership.derive(_deal_natural, members)


def _deal_natural(membership: Membership, members: int) -> HeadTiles:
    head_tiles, group = head_tiles_of(membership, members), membership.group_size
    return replace(
        head_tiles,
        key=torch.div(head_tiles.query, group, rounding_mode="floor"),  # -1 stays -1
        value=torch.div(head_tiles.head, group, rounding_mode="floor"),
    )
