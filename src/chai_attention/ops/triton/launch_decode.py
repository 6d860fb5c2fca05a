"""Decode in two launches: parts of the context, then their merge (`decode_parts`).

An exact recent window is a part, too, one for each head. Chooses the kernel's tiles and how the
context is split.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, DenseKV, PagedKV
from chai_attention.ops.fp8 import FLOAT8
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.triton import launch_hopper_decode
from chai_attention.ops.triton.checks import by_row, check, page_strides
from chai_attention.ops.triton.decode import padded
from chai_attention.ops.triton.decode_parts import _merge, _parts
from chai_attention.ops.triton.device import capability, processors
from chai_attention.ops.triton.head_tiles import HeadTiles, head_tiles_of, heads_per_tile
from chai_attention.ops.triton.local_decode import local_block
from chai_attention.ops.triton.local_only import decode_local_only, sees_local_only
from chai_attention.ops.triton.sizes import cdiv, power_of_2

logger = logging.getLogger("chai_attention")

# measured on an H100 and an H200: numbers of V per key and bytes per block of keys a program holds,
# and how many programs a processor runs at a time, by the numbers per key (of 16 bits)
COLUMNS = 1024
TILE_BYTES = 2 * 16384
RESIDENT = {1024: 3, 256: 4, 0: 6}
RESIDENT_SMALL_PAGES = {256: 3, 0: 6}  # where a block of keys lies in several pages
RESIDENT_8_BITS = {512: 2, 0: 3}
REGISTERS = 65536  # of a processor
MIN_KEYS_PER_SPLIT = 64
MAX_SPLITS = 128
MAX_WAVES = 8
# a single program on nearly each processor reads about as fast as two, with half as many parts
# (1 x 32,768, default recipe, H200: 65 us against 69)
FULL_ENOUGH = 0.9
# but not where heads share V, much of which then comes from the L2 cache: there more parts are
# faster (16 x 8,192, 8 K/V heads, H200: 157 us with 8 parts, 181 us with 2)
GROUPED_SPLITS = 8
MERGE_PROGRAMS = 256  # fewer leave processors idle while the splits are read


def dense_decode(query: Tensor, kv: DenseKV, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """`dispatch.attention` for a single query per sequence, ``[B, k, 1, D]``."""
    check(query, kv.key, kv.value)
    out = call.new_output(query, kv.value)
    lse = _run(query[:, :, 0], kv, None, call, out)
    return out[:, None], None if lse is None else lse[:, :, None]


def ring_decode(query: Tensor, kv: DenseKV, ring: RollingBuffer, call: AttentionCall) -> Tensor:
    """`dispatch.decode_recent`."""
    check(query, kv.key, kv.value, *(memory for pair in ring.memories for memory in pair))
    out = call.new_output(query, kv.value)
    _run(query[:, :, 0], kv, ring, call, out)
    return out[:, None]


def paged_decode(query: Tensor, pages: PagedKV, call: AttentionCall, out: Tensor) -> Tensor | None:
    """`dispatch.paged_decode`; returns the lse."""
    local = pages.window
    own = () if local is None else (local.key, local.value)
    check(query, pages=(pages.key, pages.value, *own))
    return _run(query, pages, local, call, out)


def _run(
    query: Tensor,
    kv: DenseKV | PagedKV,
    local: RollingBuffer | LocalPages | None,
    call: AttentionCall,
    out: Tensor,
) -> Tensor | None:
    """Choose tiles and splits and launch, into ``out [B, H, Dv]``; return the lse ``[B, k]``."""
    member = call.membership
    if isinstance(kv, PagedKV) and isinstance(local, LocalPages) and sees_local_only(member, local):
        decode_local_only(
            query, local, out, lengths=kv.seq_lens, scale=call.scale, softcap=call.softcap
        )
        return None
    lse = None
    if call.return_lse:
        shape = (query.shape[0], member.clusters)
        lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    head_tiles = head_tiles_for(query, kv, member)
    grid = choose_grid(query, kv, call, head_tiles)
    logger.debug(
        "decode kernel%s%s%s: %d members a program, %d splits",
        ", paged" if isinstance(kv, PagedKV) else "",
        ", recent window" if local is not None else "",
        ", Hopper" if grid.tensor_cores else "",
        head_tiles.members,
        grid.splits,
    )
    _launch(query, kv, local, call, head_tiles, grid, out, lse)
    return lse


def head_tiles_for(query: Tensor, kv: DenseKV | PagedKV, member: Membership) -> HeadTiles:
    """How heads are dealt out."""
    wide = padded(max(query.shape[2], kv.value.shape[3]))
    return head_tiles_of(
        member, heads_per_tile(len(member.far_heads), member.clusters, COLUMNS // wide)
    )


class Grid(NamedTuple):
    """How `decode_parts` runs.

    Attributes:
        splits: parts of the context.
        block: keys of a step.
        warps: of a program.
        stages: loads in flight.
        partials: keys of a block whose sums are kept apart until the end.
        registers: of a thread, at most.
        merge_columns: columns of V of a merging program; None for all.
        early: whether the merge may be launched while the last parts are written (Hopper and
            later).
        tensor_cores: whether the Hopper kernel computes the parts (`launch_hopper_decode`); then
            of the others only ``splits``, ``early`` and ``merge_columns`` count.
    """

    splits: int
    block: int
    warps: int
    stages: int
    partials: int
    registers: int
    merge_columns: int | None
    early: bool
    tensor_cores: bool


def choose_grid(
    query: Tensor, kv: DenseKV | PagedKV, call: AttentionCall, head_tiles: HeadTiles
) -> Grid:
    """Choose the kernel, its tiles and its splits of the context."""
    member, key, value = call.membership, kv.key, kv.value
    table, size = None, key.shape[2]
    if isinstance(kv, PagedKV):
        table = kv.block_table
        size = kv.most_keys
    batch, device, heads, members = query.shape[0], query.device, member.heads, head_tiles.members
    wide = padded(max(query.shape[2], value.shape[3]))
    columns = members * wide
    programs = batch * max(1, head_tiles.far_of_a_row(member))
    grouped = member.group_size > 1
    is_fp8, warps = value.dtype == FLOAT8, 4 if columns > 128 else 2
    block = max(8, min(64, TILE_BYTES // (columns * value.element_size())))
    small_pages = table is not None and key.shape[1] % block != 0
    resident = RESIDENT_SMALL_PAGES if small_pages else RESIDENT_8_BITS if is_fp8 else RESIDENT
    width = columns * max(2, value.element_size()) // 2
    at_a_time = next(count for least, count in resident.items() if width >= least)
    slots = processors(device)
    tensor_cores = (
        head_tiles.count > head_tiles.streaming  # else all heads stream: local keys only
        and launch_hopper_decode.fits(query, key, value, table)
    )
    if tensor_cores:
        at_a_time = launch_hopper_decode.RESIDENT
        alone = slots // programs
        if (
            head_tiles.exact
            and alone > 1
            and programs * alone >= FULL_ENOUGH * slots
            and not grouped
        ):
            at_a_time = 1
    splits = splits_of(programs, at_a_time, size, device)
    if tensor_cores and grouped:
        splits = max(splits, min(GROUPED_SPLITS, cdiv(size, MIN_KEYS_PER_SPLIT)))
    merging = max(1, MERGE_PROGRAMS // (batch * heads))
    return Grid(
        splits=splits,
        block=block,
        warps=warps,
        # wide loads of small pages wait for the block table: they are not worth running ahead
        stages=1 if small_pages and columns >= COLUMNS and key.shape[1] <= 16 else 2,
        # keys of different warps: with half the bytes to wait for, adding them up in every block
        # would be most of the time; in 16 bits it costs nothing that could be measured
        partials=max(1, warps * 32 * 16 // columns) if is_fp8 else 1,
        # else the compiler may take more, and fewer programs run at a time than were planned for
        registers=min(255, REGISTERS // (at_a_time * warps * 32) // 8 * 8),
        merge_columns=max(16, wide // power_of_2(merging)) if merging > 1 else None,
        early=capability(device) >= (9, 0),
        tensor_cores=tensor_cores,
    )


def splits_of(programs: int, resident: int, size: int, device: torch.device) -> int:
    """How many parts the context is cut into, so that programs fill whole waves of processors.

    ``programs`` is an estimate: how many head tiles of full clusters there are; ``resident`` of
    them run on a processor at a time. A wave of all processors that is only begun costs as much
    time as a full one.
    """
    slots = processors(device) * resident
    most = min(MAX_SPLITS, cdiv(size, MIN_KEYS_PER_SPLIT))
    best, best_share = 1, 0.0
    for waves in range(1, MAX_WAVES + 1):
        splits = min(slots * waves // programs, most)
        share = programs * splits / (cdiv(programs * splits, slots) * slots) if splits else 0
        if share > best_share:
            best, best_share = splits, share
        if share > 0.95:
            break
    return best


class _Window(NamedTuple):
    """What `_parts` takes of a recent window, in its order.

    Attributes:
        tensors: ring or local pages of K, sinks of K, the same of V, positions of the sinks, and
            block table of the local pages; None for what there is not.
        strides: of row or page, head and token, of both rings or local pages; of the sinks; of
            their positions.
        sizes: w, R and the ring's shift.
        stride_table: of the block table.
        sinks: s.
        page: tokens of a local page; 0 for a ring.
    """

    tensors: tuple[Tensor | None, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, int, int]
    stride_table: int
    sinks: int
    page: int


def _window_of(local: LocalPages | RollingBuffer | None) -> _Window:
    if local is None:
        return _Window((None,) * 6, (0,) * 13, (0, 1, 0), 0, 0, 0)
    if isinstance(local, LocalPages):
        table = by_row(local.block_table)
        return _Window(
            (local.key, None, local.value, None, None, table),
            (*page_strides(local.key), *page_strides(local.value), *(0,) * 7),
            (local.recent, 1, 0), table.stride(0), local.sinks, local.page,
        )  # fmt: skip
    ring, first, positions = local.ring, local.sinks, by_row(local.sink_positions)
    value_ring, value_first = local.value_ring, local.value_sinks
    strides = (
        0 if memory is None else memory.stride(axis)
        for memory in (ring, value_ring, first, value_first)
        for axis in (0, 1, 2)
    )
    return _Window(
        (ring, first, value_ring, value_first, positions, None), (*strides, positions.stride(0)),
        (local.recent, local.size, local.shift), 0, first.shape[2], 0,
    )  # fmt: skip


def _launch(
    query: Tensor,
    kv: DenseKV | PagedKV,
    local: LocalPages | RollingBuffer | None,
    call: AttentionCall,
    head_tiles: HeadTiles,
    grid: Grid,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Write ``out [B, H, Dv]``, of any strides but the last, and ``lse [B, k]``."""
    key, value, member = kv.key, kv.value, call.membership
    softcap, splits = call.softcap, grid.splits
    batch, dim, value_dim = query.shape[0], query.shape[2], value.shape[3]
    members, wide, kv_heads = head_tiles.members, padded(value_dim), member.kv_heads
    table: Tensor | None = None
    valid: Tensor | None = None
    # strides of sequence or page, head, token
    if isinstance(kv, PagedKV):
        page, size, order = key.shape[1], 0, (0, 2, 1)
        lengths: Tensor | None = by_row(kv.seq_lens)
        table = by_row(kv.block_table)
    else:
        page, size, order = 0, key.shape[2], (0, 1, 2)
        lengths, valid = by_row(kv.lengths), by_row(kv.valid)
    ids, offset, own = by_row(call.membership_ids), by_row(call.offset), local is not None
    window = _window_of(local)
    local_keys = 0
    if own:
        local_keys = local_block(window.sizes[0] + window.sinks, max(padded(dim), wide), grid.warps)
    # a window is one part more, with sums of its own for every member
    parts, device = (batch, head_tiles.count), query.device
    acc = torch.empty(*parts, splits + own, members * wide, dtype=torch.float32, device=device)
    sums = torch.empty(*parts, splits + own * members, 2, dtype=torch.float32, device=device)
    heads = head_tiles.query if query.shape[1] == member.heads else head_tiles.slot
    if grid.tensor_cores:
        assert isinstance(kv, PagedKV)
        launch_hopper_decode.launch_parts(query, kv, call, head_tiles, heads, acc, sums)
    else:
        local_programs = batch * head_tiles.count * members * own
        far_programs = (head_tiles.count - head_tiles.streaming) * splits * batch
        _parts[(local_programs + far_programs,)](
            query, key, value, lengths, valid, table, ids,
            heads, head_tiles.key, head_tiles.value, head_tiles.head, acc, sums,
            *window.tensors, member.key_place if own else None,
            call.scale, softcap or 1.0, size, local_programs, head_tiles.count,
            head_tiles.streaming,
            splits,
            *window.sizes, key.shape[order[1]], value.shape[order[1]],
            query.stride(0), query.stride(1),
            *(key.stride(axis) for axis in order), *(value.stride(axis) for axis in order),
            0 if valid is None else valid.stride(0), 0 if table is None else table.stride(0),
            head_tiles.stride, window.stride_table, *window.strides,
            D=dim, DP=padded(dim), DV=value_dim, DVP=wide, M=members, BLOCK=grid.block, PAGE=page,
            GROUP=member.group_size, KV_HEADS=kv_heads, LOCAL=local_keys,
            STEPS=cdiv(window.sizes[0] + window.sinks, max(1, local_keys)),
            LOCAL_PAGE=window.page, SINKS=window.sinks,
            SINKS_P=power_of_2(max(1, window.sinks)), HAS_IDS=ids is not None,
            HAS_LENGTH=lengths is not None, HAS_VALID=valid is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_VALUE_RING=isinstance(local, RollingBuffer) and local.value_ring is not None,
            STAGES=grid.stages, PARTIALS=grid.partials, EARLY=grid.early, num_warps=grid.warps,
            maxnreg=grid.registers,
        )  # fmt: skip
    columns = min(wide, grid.merge_columns or wide)
    _merge[(head_tiles.count, members * (wide // columns), batch)](
        acc, sums, head_tiles.slot, head_tiles.head, ids, out, lse, offset,
        head_tiles.count, head_tiles.streaming, splits, member.clusters,
        out.stride(0), out.stride(1), head_tiles.stride, 0 if offset is None else offset.stride(0),
        DV=value_dim, DVP=wide, M=members, COLUMNS=columns, SPLITS=power_of_2(splits),
        HAS_IDS=ids is not None, HAS_LOCAL=own, HAS_OFFSET=offset is not None,
        HAS_LSE=lse is not None, EARLY=grid.early, num_warps=4,
        **({"launch_pdl": True} if grid.early else {}),
    )  # fmt: skip
