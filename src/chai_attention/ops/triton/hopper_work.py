"""The Hopper kernel's list of work: which tile of which sequence an item is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from chai_attention.ops.call import PackedQueries
from chai_attention.ops.triton.head_tiles import HeadTiles
from chai_attention.ops.triton.repeated import aligned, dtypes
from chai_attention.ops.triton.sizes import cdiv, power_of_2

SEQUENCES = tl.constexpr(64)  # listed at a time; there may be more
COPIES = 32  # of a list that calls share, made at a time: one for each layer of most models


@gluon.jit
def _in_group(item, tiles, group, pairs):
    """The tile of an item, and its place among the ``pairs``.

    Pairs of a sequence and a head tile come in groups, which share the L2 cache; within a group the
    last queries, which see the most keys, come first.
    """
    start = item // (group * tiles) * group
    width = gl.minimum(group, pairs - start)
    inside = item - start * tiles
    return tiles - 1 - inside // width, start + inside % width


@gluon.jit
def dense_work(item, work_ptr, pairs, tiles, group, head_tiles, queries, size, TILE: gl.constexpr):
    """Row, pair of row and head tile, first query, first token, queries, keys of an item."""
    tile, place = _in_group(item, tiles, group, pairs)
    pair = gl.load(work_ptr + place)
    return pair // head_tiles, pair, tile * TILE, 0, queries, size


@gluon.jit
def packed_work(
    item, row, plan_ptr, start_ptr, length_ptr, ids_ptr, head_tiles, batch, stride_t,
    HAS_IDS: gl.constexpr, HAS_LENGTH: gl.constexpr, TILE: gl.constexpr, streaming=0,
):  # fmt: skip
    """The same for packed sequences; ``row`` is one that is not behind the item's.

    Items of a list come in order, so that the search goes on where it ended. A row's first
    ``streaming`` head tiles are its last work.
    """
    ahead = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    passed = 32
    while passed == 32:
        ends = gl.load(
            plan_ptr + 1 + row + ahead, mask=row + ahead < batch, other=2147483647
        )  # fmt: skip
        passed = gl.sum((ends <= item).to(gl.int32), axis=0)
        row += passed
    first = gl.load(plan_ptr + row)
    used = gl.load(plan_ptr + row + 1) - first
    begin = gl.load(start_ptr + row)
    queries = gl.load(start_ptr + row + 1) - begin
    tiles = (queries + TILE - 1) // TILE
    used = used // tiles
    tile, head_tile = _in_group(item - first, tiles, gl.maximum(2, 128 // tiles), used)
    head_tile += streaming
    head_tile = gl.where(head_tile < used, head_tile, head_tile - used)
    size = queries
    if HAS_LENGTH:
        size = gl.load(length_ptr + row)
    membership_id = row * stride_t
    if HAS_IDS:
        membership_id = gl.load(ids_ptr + row)
    return row, membership_id * head_tiles + head_tile, tile * TILE, begin, queries, size


@triton.jit(
    do_not_specialize=["head_tiles", "batch", "size"],
    do_not_specialize_on_alignment=["start_ptr", "ids_ptr"],
)
def _plan(
    start_ptr, ids_ptr, head_ptr, plan_ptr, head_tiles, batch, stride_t, size,
    HEAD_TILES_P: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Where each sequence's items begin, then the end of the list, then a counter at 0.

    Every program makes a copy, of ``size`` numbers.
    """
    plan_ptr += tl.program_id(0) * size
    before = 0
    c = tl.arange(0, HEAD_TILES_P)
    for first in range(0, batch, SEQUENCES):
        r = first + tl.arange(0, SEQUENCES)
        there = r < batch
        begin = tl.load(start_ptr + r, mask=there, other=0)
        end = tl.load(start_ptr + 1 + r, mask=there, other=0)
        membership_id = r * stride_t
        if HAS_IDS:
            membership_id = tl.load(ids_ptr + r, mask=there, other=0)
        head = tl.load(
            head_ptr + (membership_id[:, None] * head_tiles + c[None, :]) * M,
            mask=there[:, None] & (c < head_tiles)[None, :], other=-1,
        )  # fmt: skip
        # a row's head tiles without work are its last ones
        items = tl.cdiv(end - begin, TILE) * tl.sum((head >= 0).to(tl.int32), axis=1)
        tl.store(plan_ptr + 1 + r, before + tl.cumsum(items, axis=0), mask=there)
        before += tl.sum(items, axis=0)
    tl.store(plan_ptr, 0)
    tl.store(plan_ptr + batch + 1, 0)


def plan(
    head_tiles: HeadTiles, query_starts: Tensor, ids: Tensor | None, tile: int, copies: int = 1
) -> Tensor:
    """Make the list of packed sequences: ``[copies, B + 2]`` int32, see `_plan`."""
    batch = query_starts.shape[0] - 1
    size = cdiv(batch + 2, 4) * 4  # kernels expect lists at multiples of 16 bytes
    made = torch.empty(copies, size, dtype=torch.int32, device=query_starts.device)
    key = (plan, tile, *dtypes(query_starts, ids))
    launch = head_tiles.launches.get(key) or head_tiles.launches.keep(
        key, _plan, HEAD_TILES_P=power_of_2(head_tiles.count), M=head_tiles.members, TILE=tile,
        HAS_IDS=ids is not None, num_warps=4,
    )  # fmt: skip
    launch(
        (copies, 1, 1), aligned(made), query_starts, ids, head_tiles.head, made,
        head_tiles.count, batch, head_tiles.stride, size,
    )  # fmt: skip
    return made[:, : batch + 2]


def plan_of(head_tiles: HeadTiles, queries: PackedQueries, ids: Tensor | None, tile: int) -> Tensor:
    """Return a list to use up: ``[B + 2]`` int32.

    Where all head tiles of all sequences have work, the list depends on the sequences alone. Then
    calls that share what is made of these (`PackedQueries.shared`) take one copy each.
    """
    starts, shared = queries.query_start_loc, queries.shared
    if shared is None or ids is not None or head_tiles.stride or not head_tiles.exact:
        return plan(head_tiles, starts, ids, tile)[0]
    copies: list[Tensor] = shared.setdefault((plan, head_tiles.count, tile), [])
    if not copies:
        copies += plan(head_tiles, starts, None, tile, COPIES).unbind()
    return copies.pop()
