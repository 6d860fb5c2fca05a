"""Prefill with an exact window for Hopper GPUs, in one launch: far keys, then local ones.

The far part is that of `hopper`; `hopper_local` goes on with it for every member. Head tiles of
streaming heads have no far part. Sequences are of equal length, or packed prompts without context.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from chai_attention.ops.triton.hopper import LOG2_E, _store_layout
from chai_attention.ops.triton.hopper_far import attend_far
from chai_attention.ops.triton.hopper_fetch import (
    barriers,
    buffers,
    fetch_blocks,
    fetch_queries,
    finish,
    release,
    tell,
    told,
    told_all,
)
from chai_attention.ops.triton.hopper_local import attend_local, fetch_local, halves
from chai_attention.ops.triton.hopper_work import dense_work, packed_work

# of an item: is there one, row, pair, first query, far blocks, members, first token, queries
FIELDS = gl.constexpr(8)


@gluon.jit
def _local(
    HALF: gl.constexpr, q_bufs, k_all, v_one, q_full, q_free, full, free, offset_ptr, out_ptr,
    part, best, weight, done, asked, row, head, first, begin, queries, past, recent, local, factor,
    stride_ob, stride_os, stride_oh, stride_offset,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, SINKS: gl.constexpr, RAGGED: gl.constexpr, HAS_OFFSET: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Go on with one member's local keys, and write its outputs; the number of stages so far."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    one: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    store: gl.constexpr = _store_layout(D)
    if HAS_OFFSET:
        best = best + gl.load(offset_ptr + row * stride_offset + head) * LOG2_E
        weight = gl.where(best > float("-inf"), weight, 0.0)
    first += HALF * ROWS
    position = past + first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores))
    place = asked % 2
    q = q_bufs.index(place * 2 + HALF).reshape([ROWS, D])
    mbarrier.wait(q_full.index(place), (asked // 2) & 1)
    part, best, weight, done = attend_local(
        HALF, q, k_all, v_one, full, free, part, best, weight, done, position,
        past + first - HALF * ROWS, recent, local, past + queries, factor,
        BLOCK, M, STAGES, SINKS, RAGGED, DTYPE,
    )  # fmt: skip
    release(q_free.index(place))
    share = gl.convert_layout(1.0 / weight, gl.SliceLayout(1, one))
    result = gl.convert_layout((part * share[:, None]).to(DTYPE), store)
    io = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, store))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, store))
    target = out_ptr + row.to(gl.int64) * stride_ob + head * stride_oh
    token = (begin + io).to(gl.int64)
    target = target + token[:, None] * stride_os + column[None, :]
    gl.store(target, result, mask=(io < queries)[:, None])
    return done


@gluon.jit
def _attend(
    HALF: gl.constexpr, q_bufs, k_all, v_all, v_one, item_buf, item_full, item_free, q_full, q_free,
    full, free, turns, head_ptr, offset_ptr, out_ptr, factor, size, past, recent, local,
    stride_ob, stride_os, stride_oh, stride_offset,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, SINKS: gl.constexpr, RAGGED: gl.constexpr, HAS_OFFSET: gl.constexpr,
    DTYPE: gl.constexpr,
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
        row, pair, first, blocks, lanes, begin, queries = told_all(item_buf, 1, 8)
        if RAGGED:
            size = queries - recent - SINKS
        release(item_free)
        turn += 1
        lowest = size - queries + first + HALF * ROWS
        reach = gl.minimum(lowest + gl.arange(0, ROWS, layout=by_row), size - 1)
        place = asked % 2
        q = q_bufs.index(place * 2 + HALF).reshape([ROWS, D])
        if (blocks > 0) & (lanes == 1):
            mbarrier.wait(q_full.index(place), (asked // 2) & 1)
            alone, top, share, done, laps = attend_far(
                HALF, q, k_all, v_one, v_one, full, free, turns, q_free.index(place), blocks,
                done, laps, reach, lowest, size + recent, factor, ROWS, BLOCK, D, STAGES, M,
                RAGGED, False, 0, DTYPE,
            )  # fmt: skip
            asked += 1
            done = _local(
                HALF, q_bufs, k_all, v_one, q_full, q_free, full, free, offset_ptr, out_ptr,
                alone, top, share, done, asked, row, gl.load(head_ptr + pair * M),
                first, begin, queries, past, recent, local, factor,
                stride_ob, stride_os, stride_oh, stride_offset,
                ROWS, BLOCK, D, M, STAGES, SINKS, RAGGED, HAS_OFFSET, DTYPE,
            )  # fmt: skip
            asked += 1
        else:
            best = gl.full([ROWS], float("-inf"), gl.float32, layout=by_row)
            weight = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
            part = gl.full([ROWS, D], 0.0, gl.float32, layout=one)
            other = part
            if M > 1:  # noqa: SIM102 - known when compiled
                if blocks > 0:
                    mbarrier.wait(q_full.index(place), (asked // 2) & 1)
                    acc, best, weight, done, laps = attend_far(
                        HALF, q, k_all, v_all, v_one, full, free, turns, q_free.index(place),
                        blocks, done, laps, reach, lowest, size + recent, factor, ROWS, BLOCK,
                        M * D, STAGES, 1, RAGGED, False, 0, DTYPE,
                    )  # fmt: skip
                    part, other = halves(acc, M, one)
                    asked += 1
            # one piece of code for both members: the kernel is longer than what a processor holds
            for member in range(0, lanes):
                done = _local(
                    HALF, q_bufs, k_all, v_one, q_full, q_free, full, free, offset_ptr, out_ptr,
                    part, best, weight, done, asked, row, gl.load(head_ptr + pair * M + member),
                    first, begin, queries, past, recent, local, factor,
                    stride_ob, stride_os, stride_oh, stride_offset,
                    ROWS, BLOCK, D, M, STAGES, SINKS, RAGGED, HAS_OFFSET, DTYPE,
                )  # fmt: skip
                asked += 1
                part = other
        mbarrier.wait(item_full, turn & 1)


@gluon.jit
def _fetch(
    q_tiles, k_tiles, v_tiles, local_k_tiles, local_v_tiles, q_bufs, k_bufs, v_bufs, k_one, v_one,
    item_buf, item_full, item_free, q_full, q_free, full, free,
    next_ptr, work_ptr, start_ptr, ids_ptr, slot_ptr, query_ptr, key_ptr, head_ptr, value_ptr,
    items, pairs, tiles, group, streaming, head_tiles, queries, size, past, recent, local, shift,
    batch, stride_t,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, SINKS: gl.constexpr, SHARED: gl.constexpr, RAGGED: gl.constexpr,
    HAS_IDS: gl.constexpr,
):  # fmt: skip
    """Take items from the list and bring their Q, K and V to shared memory."""
    done = 0
    asked = 0
    turn = 0
    row = 0
    far = 0  # where the far keys begin
    item = gl.atomic_add(next_ptr, 1)
    while item < items:
        if RAGGED:
            row, pair, first, begin, queries, size = packed_work(
                item, row, work_ptr, start_ptr, start_ptr, ids_ptr, head_tiles, batch, stride_t,
                HAS_IDS, False, 2 * ROWS, streaming,
            )  # fmt: skip
            size -= recent + SINKS
            outer = 0  # of the tensors: all sequences are in one
            far = begin + SINKS
            shift = begin
        else:
            row, pair, first, begin, _count, _keys = dense_work(
                item, work_ptr, pairs, tiles, group, head_tiles, queries, size, 2 * ROWS
            )
            outer = row
        stop = gl.minimum(size, size - queries + first + 2 * ROWS)
        blocks = (gl.maximum(stop, 0) + BLOCK - 1) // BLOCK
        blocks = gl.where(gl.load(slot_ptr + pair) < 0, 0, blocks)
        lanes = 1
        for member in gl.static_range(1, M):
            lanes += (gl.load(head_ptr + pair * M + member) >= 0).to(gl.int32)
        mbarrier.wait(item_free, (turn & 1) ^ 1)
        tell(item_buf, (1, row, pair, first, blocks, lanes, begin, queries))
        mbarrier.arrive(item_full, count=1)
        turn += 1
        if blocks > 0:
            fetch_queries(q_tiles, q_bufs, q_full, q_free, asked, outer,
                           gl.load(query_ptr + pair), begin + first, ROWS)  # fmt: skip
            asked += 1
            done = fetch_blocks(
                k_tiles, v_tiles, k_bufs, v_bufs, full, free, done, outer, pair,
                gl.load(key_ptr + pair), far, blocks, lanes, size, value_ptr, work_ptr, 0,
                BLOCK, D, M, STAGES, 0, 0,
            )  # fmt: skip
        for member in range(0, lanes):
            head = gl.load(head_ptr + pair * M + member)
            fetch_queries(q_tiles, q_bufs, q_full, q_free, asked, outer, head, begin + first, ROWS)
            asked += 1
            done = fetch_local(
                local_k_tiles, local_v_tiles, k_one, v_one, full, free, done, outer,
                head // SHARED, past + first - recent + 1 + shift, begin, local,
                BLOCK, D, M, STAGES, SINKS,
            )  # fmt: skip
        item = gl.atomic_add(next_ptr, 1)
    finish(item_buf, item_full, item_free, turn)


@gluon.jit(
    do_not_specialize=[
        "queries", "size", "past", "recent", "local", "shift", "head_tiles", "streaming", "tiles",
        "group", "batch",
    ],
    do_not_specialize_on_alignment=["start_ptr", "ids_ptr", "offset_ptr"],
)  # fmt: skip
def prefill_window(
    q_tiles, k_tiles, v_tiles, local_k_tiles, local_v_tiles, next_ptr, work_ptr, count_ptr,
    start_ptr, ids_ptr, slot_ptr, query_ptr, key_ptr, head_ptr, value_ptr, offset_ptr, out_ptr,
    scale, queries, size, past, recent, local, shift, head_tiles, streaming, tiles, group, batch,
    stride_t, stride_ob, stride_os, stride_oh, stride_offset,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, SINKS: gl.constexpr, SHARED: gl.constexpr, RAGGED: gl.constexpr,
    HAS_IDS: gl.constexpr, HAS_OFFSET: gl.constexpr,
):  # fmt: skip
    """Tiles of 2 * ROWS queries and a head tile of M members each, from a list, longest first.

    ``size`` far keys, ``past`` tokens before the queries, ``local`` blocks of a band, of which
    position p stands at p + ``shift``; ``SHARED`` query heads have one K/V head. RAGGED: prompts
    without context are packed, and the list is `hopper_work.plan`'s.
    """
    DTYPE: gl.constexpr = q_tiles.dtype
    q_bufs, k_bufs, v_bufs, k_all, v_all, v_one = buffers(
        q_tiles, k_tiles, v_tiles, 4, STAGES, BLOCK, D, M
    )
    item_buf, item_full, item_free, q_full, q_free, full, free, turns = barriers(
        FIELDS, STAGES, True
    )
    if not HAS_OFFSET:
        offset_ptr = work_ptr
    if not HAS_IDS:
        ids_ptr = work_ptr
    if RAGGED:
        local_k_tiles = k_tiles  # the same keys, of which each query sees some local
        local_v_tiles = v_tiles
        next_ptr = work_ptr + batch + 1
        pairs = 0
        items = gl.load(work_ptr + batch)
    else:
        start_ptr = work_ptr
        pairs = gl.load(count_ptr)
        items = pairs * tiles
    factor = scale * LOG2_E
    gl.warp_specialize([
        (_attend, (
            0, q_bufs, k_all, v_all, v_one, item_buf, item_full, item_free, q_full, q_free,
            full, free, turns, head_ptr, offset_ptr, out_ptr, factor, size, past, recent,
            local, stride_ob, stride_os, stride_oh, stride_offset,
            ROWS, BLOCK, D, M, STAGES, SINKS, RAGGED, HAS_OFFSET, DTYPE)),
        (_attend, (
            1, q_bufs, k_all, v_all, v_one, item_buf, item_full, item_free, q_full, q_free,
            full, free, turns, head_ptr, offset_ptr, out_ptr, factor, size, past, recent,
            local, stride_ob, stride_os, stride_oh, stride_offset,
            ROWS, BLOCK, D, M, STAGES, SINKS, RAGGED, HAS_OFFSET, DTYPE)),
        (_fetch, (
            q_tiles, k_tiles, v_tiles, local_k_tiles, local_v_tiles, q_bufs, k_bufs, v_bufs,
            k_bufs, v_bufs, item_buf, item_full, item_free, q_full, q_free, full, free,
            next_ptr, work_ptr, start_ptr, ids_ptr, slot_ptr, query_ptr, key_ptr, head_ptr,
            value_ptr, items, pairs, tiles, group, streaming, head_tiles, queries, size, past,
            recent, local, shift, batch, stride_t,
            ROWS, BLOCK, D, M, STAGES, SINKS, SHARED, RAGGED, HAS_IDS)),
    ], [4, 1], [240, 24])  # fmt: skip
