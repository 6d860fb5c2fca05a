"""Prefill with an exact window over pages, for Hopper GPUs: far keys, then local ones, in a launch.

As `hopper_window`, but for packed sequences behind their context: far keys stand in far pages,
among them those that are local, and local keys in far or local pages (`hopper_pages`). Local keys
of a block are multiplied together with those of the block before (`hopper_band`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from chai_attention.ops.triton.hopper import LOG2_E, _store_layout
from chai_attention.ops.triton.hopper_band import attend_band
from chai_attention.ops.triton.hopper_far import attend_far
from chai_attention.ops.triton.hopper_fetch import (
    barriers,
    buffers,
    reinterpret,
    release,
    told,
    told_all,
)
from chai_attention.ops.triton.hopper_local import BOX, halves
from chai_attention.ops.triton.hopper_pages import COLUMNS, FIELDS, fetch_pages


@gluon.jit
def _local(
    HALF: gl.constexpr, q_bufs, k_all, v_one, q_full, q_free, full, free, out_ptr,
    part, best, weight, done, asked, head, offset, first, begin, queries, length, local,
    local_blocks, recent, factor, stride_os, stride_oh,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, SINKS: gl.constexpr, HAS_OFFSET: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Go on with one member's local keys, and write its outputs; the number of stages so far."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    one: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    store: gl.constexpr = _store_layout(D)
    if HAS_OFFSET:
        best = best + offset * LOG2_E
        weight = gl.where(best > float("-inf"), weight, 0.0)
    start = length - queries + first  # the tile's first query
    first += HALF * ROWS
    position = start + HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores))
    place = asked % 2
    q = q_bufs.index(place * 2 + HALF).reshape([ROWS, D])
    mbarrier.wait(q_full.index(place), (asked // 2) & 1)
    part, best, weight, done = attend_band(
        HALF, q, k_all, v_one, full, free, part, best, weight, done, position,
        start - recent + 1, local, local_blocks, recent, length, factor,
        ROWS, BLOCK, M, STAGES, SINKS, DTYPE,
    )  # fmt: skip
    release(q_free.index(place))
    share = gl.where(weight > 0, 1.0 / weight, 0.0)  # a sequence may have no keys
    share = gl.convert_layout(share, gl.SliceLayout(1, one))
    result = gl.convert_layout((part * share[:, None]).to(DTYPE), store)
    io = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, store))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, store))
    token = (begin + io).to(gl.int64)
    target = out_ptr + head * stride_oh + token[:, None] * stride_os + column[None, :]
    gl.store(target, result, mask=(io < queries)[:, None])
    return done


@gluon.jit
def _attend(
    HALF: gl.constexpr, q_bufs, k_all, v_all, v_one, item_buf, item_full, item_free, q_full, q_free,
    full, free, turns, out_ptr, factor, recent, stride_os, stride_oh,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, SINKS: gl.constexpr, HAS_OFFSET: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Attend with one half of every tile's queries."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    one: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    done = 0  # stages
    asked = 0  # tiles of Q
    turn = 0  # items
    laps = 0
    mbarrier.wait(item_full, 0)
    while told(item_buf, 0) > 0:
        first, blocks, lanes = told_all(item_buf, 1, 4)
        queries = told(item_buf, 5)
        size = told(item_buf, 6) - recent
        turn += 1
        lowest = size - queries + first + HALF * ROWS
        reach = gl.minimum(lowest + gl.arange(0, ROWS, layout=by_row), size - 1)
        place = asked % 2
        best = gl.full([ROWS], float("-inf"), gl.float32, layout=by_row)
        weight = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
        part = gl.full([ROWS, D], 0.0, gl.float32, layout=one)
        other = part
        if blocks > 0:
            mbarrier.wait(q_full.index(place), (asked // 2) & 1)
            asked += 1
            # each branch reads the place of Q for itself: of a place that both know, ptxas 12.8
            # computes descriptors in the first branch alone, and the second one takes any Q
            if lanes == 1:
                q = q_bufs.index(told(item_buf, 13) * 2 + HALF).reshape([ROWS, D])
                part, best, weight, done, laps = attend_far(
                    HALF, q, k_all, v_one, v_one, full, free, turns, q_free.index(place), blocks,
                    done, laps, reach, lowest, size + recent, factor, ROWS, BLOCK, D, STAGES, M,
                    True, True, SINKS, DTYPE,
                )  # fmt: skip
            elif M > 1:
                q = q_bufs.index(told(item_buf, 14) * 2 + HALF).reshape([ROWS, D])
                acc, best, weight, done, laps = attend_far(
                    HALF, q, k_all, v_all, v_one, full, free, turns, q_free.index(place), blocks,
                    done, laps, reach, lowest, size + recent, factor, ROWS, BLOCK, M * D, STAGES, 1,
                    True, True, SINKS, DTYPE,
                )  # fmt: skip
                part, other = halves(acc, M, one)
        # read when they are needed: the far part needs all registers
        first = told(item_buf, 1)
        lanes, begin, queries, length, local, local_blocks, head, next_head = told_all(
            item_buf, 3, 11
        )
        offset = told(item_buf, 11).to(gl.float32, bitcast=True)
        next_offset = told(item_buf, 12).to(gl.float32, bitcast=True)
        release(item_free)
        # one piece of code for all members: the kernel is longer than what a processor holds
        for _ in range(0, lanes):
            done = _local(
                HALF, q_bufs, k_all, v_one, q_full, q_free, full, free, out_ptr,
                part, best, weight, done, asked, head, offset, first, begin, queries, length,
                local, local_blocks, recent, factor, stride_os, stride_oh,
                ROWS, BLOCK, D, M, STAGES, SINKS, HAS_OFFSET, DTYPE,
            )  # fmt: skip
            asked += 1
            part = other
            head = next_head
            offset = next_offset
        mbarrier.wait(item_full, turn & 1)


@gluon.jit(
    do_not_specialize=[
        "recent", "head_tiles", "streaming", "batch", "kept_keys", "kept_values", "stride_table",
        "stride_local",
    ],
    do_not_specialize_on_alignment=[
        "start_ptr", "length_ptr", "table_ptr", "local_table_ptr", "ids_ptr", "offset_ptr",
    ],
)  # fmt: skip
def prefill_paged_window(
    q_tiles, k_tiles, v_tiles, box_k_tiles, box_v_tiles, local_k_tiles, local_v_tiles,
    work_ptr, start_ptr, length_ptr, table_ptr, local_table_ptr, ids_ptr, slot_ptr, query_ptr,
    key_ptr, head_ptr, value_ptr, key_place_ptr, value_place_ptr, offset_ptr, out_ptr,
    scale, recent, head_tiles, streaming, batch, kept_keys, kept_values,
    stride_t, stride_table, stride_local, stride_os, stride_oh, stride_offset,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, SINKS: gl.constexpr, SHARED: gl.constexpr, GROUPS: gl.constexpr,
    PAGE: gl.constexpr, LOCAL_PAGE: gl.constexpr, HAS_IDS: gl.constexpr,
    HAS_OFFSET: gl.constexpr,
):  # fmt: skip
    """Tiles of 2 * ROWS queries and a head tile of M members each, from `hopper_work.plan`'s list.

    ``k_tiles`` and ``v_tiles`` are far pages of PAGE tokens in large boxes, ``box_*`` the same in
    boxes of 16 tokens, ``local_*`` local pages of LOCAL_PAGE in such; ``SHARED`` query heads have
    one of ``GROUPS`` K/V heads.
    """
    DTYPE: gl.constexpr = q_tiles.dtype
    q_bufs, k_bufs, v_bufs, k_all, v_all, v_one = buffers(
        q_tiles, k_tiles, v_tiles, 4, STAGES, BLOCK, D, M
    )
    boxes: gl.constexpr = STAGES * BLOCK * D // (BOX * COLUMNS)
    box: gl.constexpr = local_k_tiles.layout
    k_local = reinterpret(k_bufs, DTYPE, [boxes, 1, 1, BOX, COLUMNS], box)
    v_local = reinterpret(v_bufs, DTYPE, [boxes * M, 1, 1, BOX, COLUMNS], box)
    item_buf, item_full, item_free, q_full, q_free, full, free, turns = barriers(
        FIELDS, STAGES, True
    )
    # functions take no None
    if not HAS_OFFSET:
        offset_ptr = work_ptr
    if not HAS_IDS:
        ids_ptr = work_ptr
    next_ptr = work_ptr + batch + 1
    items = gl.load(work_ptr + batch)
    factor = scale * LOG2_E
    gl.warp_specialize([
        (_attend, (
            0, q_bufs, k_all, v_all, v_one, item_buf, item_full, item_free, q_full, q_free,
            full, free, turns, out_ptr, factor, recent, stride_os, stride_oh,
            ROWS, BLOCK, D, M, STAGES, SINKS, HAS_OFFSET, DTYPE)),
        (_attend, (
            1, q_bufs, k_all, v_all, v_one, item_buf, item_full, item_free, q_full, q_free,
            full, free, turns, out_ptr, factor, recent, stride_os, stride_oh,
            ROWS, BLOCK, D, M, STAGES, SINKS, HAS_OFFSET, DTYPE)),
        (fetch_pages, (
            q_tiles, k_tiles, v_tiles, box_k_tiles, box_v_tiles, local_k_tiles, local_v_tiles,
            q_bufs, k_bufs, v_bufs, k_local, v_local, item_buf, item_full, item_free, q_full,
            q_free, full, free, next_ptr, work_ptr, start_ptr, length_ptr, table_ptr,
            local_table_ptr, ids_ptr, slot_ptr, query_ptr, key_ptr, head_ptr, value_ptr,
            key_place_ptr, value_place_ptr, offset_ptr, items, streaming, head_tiles, recent,
            kept_keys, kept_values, batch, stride_t, stride_table, stride_local, stride_offset,
            ROWS, BLOCK, D, M, STAGES, SINKS, SHARED, GROUPS, PAGE, LOCAL_PAGE, HAS_IDS,
            HAS_OFFSET)),
    ], [4, 1], [240, 24])  # fmt: skip
