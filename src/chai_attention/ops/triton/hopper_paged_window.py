"""Prefill with an exact window over pages, for Hopper GPUs: far keys, then local ones, in a launch.

As `hopper_window`, but for packed sequences behind their context: far keys stand in far pages,
among them those that are local, and local keys in far or local pages (`hopper_pages`). Local keys
of a block are multiplied together with those of the block before (`hopper_band`).
"""

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from chai_attention.ops.triton.hopper import LOG2_E, _softmax, _step, _store_layout
from chai_attention.ops.triton.hopper_band import attend_band, blank
from chai_attention.ops.triton.hopper_fetch import reinterpret, told
from chai_attention.ops.triton.hopper_local import halves, leave, release
from chai_attention.ops.triton.hopper_pages import BOX, COLUMNS, FIELDS, block_at, fetch_pages


@gluon.jit
def _far(
    HALF: gl.constexpr, q, k_all, v_all, v_one, full, free, turns, q_done, blocks, done, laps,
    reach, lowest, there, factor,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    EACH: gl.constexpr, LOW: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """A half's far keys, of which each query sees those up to ``reach``, at least ``lowest``.

    Queries see keys from LOW on. Behind the first ``there`` keys stands anything.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    zero = gl.full([ROWS, BLOCK], 0.0, gl.float32, layout=scores)
    best = gl.full([ROWS], float("-inf"), gl.float32, layout=by_row)
    weight = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
    acc = gl.full([ROWS, WIDTH], 0.0, gl.float32, layout=output)
    every = blocks
    if HALF == 0:
        # the last block may be the other half's alone
        for _ in range(0, gl.where((blocks - 1) * BLOCK > lowest + ROWS - 1, 1, 0)):
            if blocks > 1:
                leave(full, free, done, STAGES)
                mbarrier.wait(turns.index(0), (laps & 1) ^ 1)
                mbarrier.arrive(turns.index(1), count=1)
                laps += 1
                done += 1
                blocks -= 1
    # every query sees the first `whole` blocks whole; not the last block, which is masked even
    # where it need not be
    whole = gl.minimum(gl.maximum(lowest + 1, 0) // BLOCK, blocks - 1)
    stage = done % STAGES
    mbarrier.wait(full.index(stage), (done // STAGES) & 1)
    s = warpgroup_mma(q, k_all.index(stage).permute([1, 0]), zero, use_acc=False)
    left = every - blocks  # by this half
    last = block_at(left, every, LOW) * BLOCK
    at = last + gl.arange(0, BLOCK, layout=by_key)
    p, _old, best, weight = _softmax(s, best, weight, factor, at, reach, True, LOW)
    p16 = gl.convert_layout(p.to(DTYPE), weights)
    release(free.index(stage))
    stage = (done + 1) % STAGES
    mbarrier.wait(full.index(stage), ((done + 1) // STAGES) & 1)
    if last + BLOCK > there:
        for part in gl.static_range(WIDTH // v_one.shape[2]):
            blank(v_one.index(stage * (v_one.shape[0] // STAGES) + part), 0, there - last)
    masked = gl.minimum(blocks, blocks - whole + (1 if LOW > 0 else 0))
    for n in range(1, masked):
        acc, p16, best, weight = _step(
            HALF, q, k_all, v_all, full, free, turns, acc, p16, best, weight, laps, done + n,
            block_at(left + n, every, LOW) * BLOCK, reach, factor, ROWS, BLOCK, STAGES, True,
            DTYPE, EACH, LOW,
        )  # fmt: skip
        laps += 1
    for n in range(masked, blocks):
        acc, p16, best, weight = _step(
            HALF, q, k_all, v_all, full, free, turns, acc, p16, best, weight, laps, done + n,
            0, reach, factor, ROWS, BLOCK, STAGES, False, DTYPE, EACH,
        )  # fmt: skip
        laps += 1
    release(q_done)
    stage = (done + blocks) % STAGES
    acc = warpgroup_mma(p16, v_all.index(stage * EACH), acc)
    release(free.index(stage))
    return acc, best, weight, done + blocks + 1, laps


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
        first = told(item_buf, 1)
        blocks = told(item_buf, 2)
        lanes = told(item_buf, 3)
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
                part, best, weight, done, laps = _far(
                    HALF, q, k_all, v_one, v_one, full, free, turns, q_free.index(place), blocks,
                    done, laps, reach, lowest, size + recent, factor, ROWS, BLOCK, D, STAGES, M,
                    SINKS, DTYPE,
                )  # fmt: skip
            elif M > 1:
                q = q_bufs.index(told(item_buf, 14) * 2 + HALF).reshape([ROWS, D])
                acc, best, weight, done, laps = _far(
                    HALF, q, k_all, v_all, v_one, full, free, turns, q_free.index(place), blocks,
                    done, laps, reach, lowest, size + recent, factor, ROWS, BLOCK, M * D, STAGES, 1,
                    SINKS, DTYPE,
                )  # fmt: skip
                part, other = halves(acc, M, one)
        # read when they are needed: the far part needs all registers
        first = told(item_buf, 1)
        lanes = told(item_buf, 3)
        begin = told(item_buf, 4)
        queries = told(item_buf, 5)
        length = told(item_buf, 6)
        local = told(item_buf, 7)
        local_blocks = told(item_buf, 8)
        head = told(item_buf, 9)
        next_head = told(item_buf, 10)
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
    q_shape: gl.constexpr = [4] + q_tiles.block_type.shape  # noqa: RUF005
    q_bufs = gl.allocate_shared_memory(DTYPE, q_shape, q_tiles.layout)
    # filled piece by piece; pieces lie as the parts of the whole block's tile do
    pieces: gl.constexpr = STAGES * BLOCK * D // (k_tiles.block_type.nbytes // 2)
    k_shape: gl.constexpr = [pieces] + k_tiles.block_type.shape  # noqa: RUF005
    k_bufs = gl.allocate_shared_memory(DTYPE, k_shape, k_tiles.layout)
    v_shape: gl.constexpr = [pieces * M] + v_tiles.block_type.shape  # noqa: RUF005
    v_bufs = gl.allocate_shared_memory(DTYPE, v_shape, v_tiles.layout)
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    k_all = reinterpret(k_bufs, DTYPE, [STAGES, BLOCK, D], flat)
    v_all = reinterpret(v_bufs, DTYPE, [STAGES, BLOCK, M * D], flat)
    v_one = reinterpret(v_bufs, DTYPE, [STAGES * M, BLOCK, D], flat)
    boxes: gl.constexpr = STAGES * BLOCK * D // (BOX * COLUMNS)
    box: gl.constexpr = local_k_tiles.layout
    k_local = reinterpret(k_bufs, DTYPE, [boxes, 1, 1, BOX, COLUMNS], box)
    v_local = reinterpret(v_bufs, DTYPE, [boxes * M, 1, 1, BOX, COLUMNS], box)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    item_buf = gl.allocate_shared_memory(gl.int32, [FIELDS, 1], shared)
    item_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    item_free = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(item_full, count=1)
    mbarrier.init(item_free, count=2)  # both halves have to be through
    for place in gl.static_range(2):
        mbarrier.init(turns.index(place), count=1)
        mbarrier.init(q_full.index(place), count=1)
        mbarrier.init(q_free.index(place), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
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
