"""Launches the Hopper prefill kernel: batches of equal length, packed sequences, pages."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.triton.device import processors
from chai_attention.ops.triton.head_tiles import HeadTiles
from chai_attention.ops.triton.hopper import prefill_hopper
from chai_attention.ops.triton.hopper_local import BOX, SINKS_MOST
from chai_attention.ops.triton.hopper_paged_window import (
    prefill_paged_window as _prefill_paged_window,
)
from chai_attention.ops.triton.hopper_pages import COLUMNS
from chai_attention.ops.triton.hopper_window import prefill_window as _prefill_window
from chai_attention.ops.triton.hopper_work import plan_of
from chai_attention.ops.triton.launch_prefill import group_of, heads_per_tile_for
from chai_attention.ops.triton.repeated import aligned, dtypes
from chai_attention.ops.triton.sizes import cdiv
from chai_attention.ops.windowed import WindowTables

ROWS = 64  # queries of a warpgroup; a tile has two
LEAST_QUERIES = 65  # that are worth tiles of 128
WIDTHS = (128, 256)  # columns of V a program can hold, of all its members
BLOCK = 64  # keys of a step
STAGES = 3  # blocks in shared memory
SINKS = SINKS_MOST.value  # sinks that a window can have


def prefill(
    query: Tensor,
    kv: DenseKV,
    call: AttentionCall,
    head_tiles: HeadTiles,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Write ``out [B, Q, H, Dv]`` and ``lse [B, k, Q]`` for ``query [B, k, Q, D]``."""
    batch, _, queries, _ = query.shape
    tiles, dim = cdiv(queries, 2 * ROWS), query.shape[3]
    work, count = head_tiles.used
    box = [1, 1, BLOCK, dim]
    prefill_hopper[(min(processors(query.device), tiles * head_tiles.count * batch),)](
        tiles_of(query, [1, 1, ROWS, dim]), tiles_of(kv.key, box), tiles_of(kv.value, box),
        torch.zeros(1, dtype=torch.int32, device=query.device),  # the next item of the list
        work, count, None, None, None, None,
        head_tiles.slot, head_tiles.slot, *head_tiles.tables[2:], out, lse,
        call.scale, queries, kv.key.shape[2], head_tiles.count, tiles, group_of(tiles), batch,
        0, 0, *out.stride()[:3], *((0, 0, 0) if lse is None else lse.stride()),
        ROWS=ROWS, BLOCK=BLOCK, D=dim, M=head_tiles.members, STAGES=STAGES, RAGGED=False, PAGE=0,
        HAS_IDS=False, HAS_LENGTH=False, HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip


def prefill_packed(
    queries: PackedQueries,
    kv: PagedKV | PackedKV,
    call: AttentionCall,
    head_tiles: HeadTiles,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Write ``out [T, H, Dv]`` and ``lse [T, k]``; as `launch_prefill.packed_prefill`."""
    starts, ids, query = queries.query_start_loc, call.membership_ids, queries.query
    batch, (total, held, dim) = starts.shape[0] - 1, query.shape
    page, lengths, table = 0, None, None
    if isinstance(kv, PackedKV):
        box = [1, 1, BLOCK, dim]
        tiles = _packed_tiles(kv.key, box), _packed_tiles(kv.value, box)
    else:
        page, lengths, table = kv.key.shape[1], kv.seq_lens, kv.block_table
        tiles = kv.once(_tiles_of_far_pages)
    heads = head_tiles.query if held == call.membership.heads else head_tiles.slot
    strides = (
        0, *out.stride()[:2], *((0, 0, 0) if lse is None else (0, lse.stride(1), lse.stride(0)))
    )  # fmt: skip
    given = [out] if lse is None else [out, lse]
    key = (
        prefill_packed, dim, page, held, strides, len(given), out.dtype,
        *dtypes(starts, lengths, table, ids),
    )  # fmt: skip
    launch = head_tiles.launches.get(key) or head_tiles.launches.keep(
        key, prefill_hopper, ROWS=ROWS, BLOCK=BLOCK, D=dim, M=head_tiles.members, STAGES=STAGES,
        RAGGED=True, PAGE=page, HAS_IDS=ids is not None, HAS_LENGTH=lengths is not None,
        HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip
    programs = (total // (2 * ROWS) + batch) * head_tiles.count
    launch(
        (min(processors(query.device), programs), 1, 1), aligned(*given),
        _packed_tiles(query, [1, 1, ROWS, dim]), *tiles,
        None, plan_of(head_tiles, queries, ids, 2 * ROWS), None, starts, lengths, table, ids,
        head_tiles.slot, heads, *head_tiles.tables[2:], out, lse,
        float(call.scale), 0, 0, head_tiles.count, 0, 0, batch,
        0 if table is None else table.stride(0), head_tiles.stride, *strides,
    )  # fmt: skip


def window_members(query: Tensor, value: Tensor, member: Membership) -> int:
    """Members of a head tile of the kernels with a window."""
    dim = query.shape[-1]
    return min(2, max(heads_per_tile_for(query, value, member), min(WIDTHS) // dim))


def prefill_window(
    query: Tensor,
    far: DenseKV | None,
    local: LocalKeys,
    tables: WindowTables,
    call: AttentionCall,
    head_tiles: HeadTiles,
) -> Tensor:
    """Return ``[B, Q, H, Dv]`` of attention with an exact window, of no more than `SINKS` sinks.

    Args:
        query: ``[B, H, Q, D]``, all heads.
        far: the far keys alone; None if there are none.
        local: K and V of the local keys.
        tables: of these queries.
        call: how.
        head_tiles: the work, streaming heads' too.
    """
    batch, heads, queries, dim = query.shape
    offset, sinks, recent, past = call.offset, tables.sinks, tables.recent, tables.length - queries
    shape = (batch, queries, heads, local.value.shape[3])
    out = torch.empty(shape, dtype=local.value.dtype, device=query.device)
    tiles = cdiv(queries, 2 * ROWS)
    work, count = head_tiles.used
    band = local.key.shape[2] - sinks
    # without far keys local ones are described to the kernel, and not read
    key, value = local if far is None else (far.key, far.value)
    box = [1, 1, BLOCK, dim]
    _prefill_window[(min(processors(query.device), tiles * head_tiles.count * batch),)](
        tiles_of(query, [1, 1, ROWS, dim]), tiles_of(key, box), tiles_of(value, box),
        tiles_of(local.key, box), tiles_of(local.value, box),
        torch.zeros(1, dtype=torch.int32, device=query.device),  # the next item of the list
        work, count, None, None,
        *head_tiles.tables, offset, out,
        float(call.scale), queries, 0 if far is None else key.shape[2], past, recent,
        _local_blocks(recent), sinks - (past + queries - band), head_tiles.count,
        head_tiles.streaming, tiles, max(group_of(tiles), min(4, 256 // tiles)), 0, 0,
        *out.stride()[:3], 0 if offset is None else offset.stride(0),
        ROWS=ROWS, BLOCK=BLOCK, D=dim, M=head_tiles.members, STAGES=STAGES, SINKS=sinks,
        SHARED=heads // local.key.shape[1], RAGGED=False, HAS_IDS=False,
        HAS_OFFSET=offset is not None, num_warps=4,
    )  # fmt: skip
    return out


def prefill_packed_window(
    queries: PackedQueries, kv: PackedKV, call: AttentionCall, head_tiles: HeadTiles, out: Tensor
) -> None:
    """Write ``out [T, H, Dv]`` of packed prompts without context, with an exact window.

    Args:
        queries: of all heads.
        kv: in natural order, with no more than `SINKS` sinks.
        call: how.
        head_tiles: the work, for K and V in natural order.
        out: any strides but the last.
    """
    starts, ids, offset = queries.query_start_loc, call.membership_ids, call.offset
    query, batch = queries.query, starts.shape[0] - 1
    total, _, dim = query.shape
    strides = 0, *out.stride()[:2], 0 if offset is None else offset.stride(0)
    key = (
        prefill_packed_window, dim, kv.sinks, strides, out.dtype, *dtypes(starts, ids, offset)
    )  # fmt: skip
    launch = head_tiles.launches.get(key) or head_tiles.launches.keep(
        key, _prefill_window, ROWS=ROWS, BLOCK=BLOCK, D=dim, M=head_tiles.members, STAGES=STAGES,
        SINKS=kv.sinks, SHARED=call.membership.group_size, RAGGED=True,
        HAS_IDS=ids is not None, HAS_OFFSET=offset is not None, num_warps=4,
    )  # fmt: skip
    box = [1, 1, BLOCK, dim]
    programs = (total // (2 * ROWS) + batch) * head_tiles.count
    launch(
        (min(processors(query.device), programs), 1, 1), aligned(out),
        _packed_tiles(query, [1, 1, ROWS, dim]), _packed_tiles(kv.key, box),
        _packed_tiles(kv.value, box), None, None,
        None, plan_of(head_tiles, queries, ids, 2 * ROWS), None, starts, ids,
        *head_tiles.tables, offset, out,
        float(call.scale), 0, 0, 0, kv.recent, _local_blocks(kv.recent), 0, head_tiles.count,
        head_tiles.streaming, 0, 0, batch, head_tiles.stride, *strides,
    )  # fmt: skip


def fits_pages(query: Tensor, kv: PagedKV, members: int) -> bool:
    """Whether the kernel takes these."""
    local, dim = kv.window, query.shape[-1]
    assert local is not None
    return (
        local.sinks <= SINKS
        and kv.key.shape[3] == dim
        and _takes(dim, members)
        and fetchable(query)
        and kv.once(_describable)
    )


def _describable(kv: PagedKV) -> bool:
    """Whether pages can be fetched in boxes."""
    local = kv.window
    assert local is not None
    pages = [x for x in (kv.key, kv.value, local.key, local.value) if x.shape[2]]
    return (
        kv.key.shape[1] % BOX.value == local.page % BOX.value == 0
        and all(x.shape[3] == kv.key.shape[3] for x in pages)
        and fetchable(*pages)
    )


def prefill_paged_window(
    queries: PackedQueries, kv: PagedKV, call: AttentionCall, head_tiles: HeadTiles, out: Tensor
) -> None:
    """Write ``out [T, H, Dv]`` of packed sequences behind their context in pages.

    Args:
        queries: of all heads.
        kv: far and local pages whose sizes are multiples of 16, with no more than `SINKS` sinks.
        call: how.
        head_tiles: the work, streaming heads' too.
        out: any strides but the last.
    """
    local, member, offset, ids = kv.window, call.membership, call.offset, call.membership_ids
    assert local is not None
    starts, table, query = queries.query_start_loc, kv.block_table, queries.query
    batch, (total, _, dim) = starts.shape[0] - 1, query.shape
    strides = *out.stride()[:2], 0 if offset is None else offset.stride(0)
    key = (
        prefill_paged_window, dim, kv.key.shape[1], local.page, local.sinks, strides, out.dtype,
        *dtypes(starts, kv.seq_lens, table, local.block_table, ids, offset),
    )  # fmt: skip
    launch = head_tiles.launches.get(key) or head_tiles.launches.keep(
        key, _prefill_paged_window, ROWS=ROWS, BLOCK=BLOCK, D=dim, M=head_tiles.members,
        STAGES=STAGES, SINKS=local.sinks, SHARED=member.group_size, GROUPS=member.kv_heads,
        PAGE=kv.key.shape[1], LOCAL_PAGE=local.page, HAS_IDS=ids is not None,
        HAS_OFFSET=offset is not None, num_warps=4,
    )  # fmt: skip
    programs = (total // (2 * ROWS) + batch) * head_tiles.count
    launch(
        (min(processors(out.device), programs), 1, 1), aligned(out),
        _packed_tiles(query, [1, 1, ROWS, dim]), *kv.once(_tiles_of_pages),
        plan_of(head_tiles, queries, ids, 2 * ROWS), starts, kv.seq_lens, table,
        local.block_table, ids, *head_tiles.tables,
        member.key_place, member.value_place, offset, out,
        float(call.scale), local.recent, head_tiles.count, head_tiles.streaming, batch,
        member.kept_keys, member.kept_values,
        head_tiles.stride, table.stride(0), local.block_table.stride(0), *strides,
    )  # fmt: skip


def _tiles_of_far_pages(kv: PagedKV) -> tuple[TensorDescriptor, ...]:
    """Far pages, K and V."""
    size, dim = box_of(kv.key.shape[1]), kv.key.shape[3]
    # parts of a block have to be as wide as the swizzle
    box = [1, 1, size, dim if size == BLOCK else COLUMNS.value]
    return tiles_of(kv.key.transpose(1, 2), box), tiles_of(kv.value.transpose(1, 2), box)


def _tiles_of_pages(kv: PagedKV) -> tuple[TensorDescriptor, ...]:
    """Far pages in large boxes, the same in little ones, local pages; K and V each."""
    local = kv.window
    assert local is not None
    pages = [x.transpose(1, 2) for x in (kv.key, kv.value, local.key, local.value)]
    some = next(x for x in pages if x.shape[1])
    # what has no heads is described to the kernel as something else, and not read
    far_key, far_value, local_key, local_value = (x if x.shape[1] else some for x in pages)
    size, dim = box_of(kv.key.shape[1]), kv.key.shape[3]
    # parts of a block have to be as wide as the swizzle
    box = [1, 1, size, dim if size == BLOCK else COLUMNS.value]
    little = [1, 1, BOX.value, COLUMNS.value]
    return (
        tiles_of(far_key, box), tiles_of(far_value, box),
        tiles_of(far_key, little), tiles_of(far_value, little),
        tiles_of(local_key, little), tiles_of(local_value, little),
    )  # fmt: skip


def _local_blocks(recent: int) -> int:
    """Blocks of keys that a tile sees local; each half leaves one of them out."""
    return cdiv(ROWS - 1 + recent, BLOCK) + 1


def fits(query: Tensor, key: Tensor, value: Tensor, members: int) -> bool:
    """Whether this kernel can run these tensors: head sizes 64 and 128, 16-bit, aligned."""
    dim = query.shape[-1]
    return _takes(dim, members) and dim == value.shape[-1] and fetchable(query, key, value)


def _takes(dim: int, members: int) -> bool:
    """Whether the kernels are made for heads of this size, so many of them in a program."""
    return dim in (64, 128) and members * dim in WIDTHS


def fetchable(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch tiles of 16-bit tensors."""
    strides = 0
    for tensor in tensors:
        if tensor.dtype.itemsize != 2:
            return False
        for stride in tensor.stride()[:-1]:
            strides |= stride
    return not strides % 8 and aligned(*tensors)


def box_of(page: int) -> int:
    """Tokens that are fetched at a time: the largest power of two of which pages are made."""
    return min(BLOCK, page & -page)


def tiles_of(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Describe a tensor to the tensor memory accelerator, in tiles of ``block``."""
    layout = _layout(len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


class _Checked(TensorDescriptor):
    """Triton's, without its checks, which take longer than all else of a launch."""

    def __post_init__(self) -> None:
        """`fits` has checked the tensor."""


def _packed_tiles(states: Tensor, block: list[int]) -> TensorDescriptor:
    """`tiles_of` packed states ``[T, heads, D]`` as ``[1, heads, T, D]``, of which some `fits`."""
    tokens, heads, dim = states.shape
    token, head, _ = states.stride()
    shape, strides = [1, heads, tokens, dim], [heads * head, head, token, 1]
    return _Checked(states, shape, strides, block, _layout(4))


@cache
def _layout(rank: int) -> gl.NVMMASharedLayout:
    """How tiles of 16-bit numbers lie in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)
