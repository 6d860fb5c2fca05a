"""Prefill with an exact window for Hopper GPUs, in one launch: far keys, then local ones.

The far part is that of `hopper`; `hopper_local` goes on with it for every member. Head tiles of
streaming heads have no far part. Sequences are of equal length, or packed prompts without context.
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
from chai_attention.ops.triton.hopper_fetch import (
    _fetch_block,
    _fetch_tile,
    barrier,
    reinterpret,
    tell,
    told,
)
from chai_attention.ops.triton.hopper_local import (
    attend_local,
    blank,
    fetch_local,
    halves,
    leave,
    release,
)
from chai_attention.ops.triton.hopper_work import dense_work, packed_work

# of an item: is there one, row, pair, first query, far blocks, members, first token, queries
FIELDS = gl.constexpr(8)


@gluon.jit
def _far(
    HALF: gl.constexpr, q, k_all, v_all, v_one, full, free, turns, q_done, blocks, done, laps,
    reach, lowest, there, factor,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    EACH: gl.constexpr, RAGGED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """A half's far keys, of which each query sees those up to ``reach``, at least ``lowest``.

    RAGGED: behind the first ``there`` keys stand those of other sequences.
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
    last = (blocks - 1) * BLOCK
    at = last + gl.arange(0, BLOCK, layout=by_key)
    p, _old, best, weight = _softmax(s, best, weight, factor, at, reach, True)
    p16 = gl.convert_layout(p.to(DTYPE), weights)
    release(free.index(stage))
    stage = (done + 1) % STAGES
    mbarrier.wait(full.index(stage), ((done + 1) // STAGES) & 1)
    if RAGGED:  # noqa: SIM102 - known when compiled
        if last + BLOCK > there:
            for part in gl.static_range(WIDTH // v_one.shape[2]):
                blank(v_one.index(stage * (v_one.shape[0] // STAGES) + part), 0, there - last)
    for n in range(1, blocks - whole):
        acc, p16, best, weight = _step(
            HALF, q, k_all, v_all, full, free, turns, acc, p16, best, weight, laps, done + n,
            last - n * BLOCK, reach, factor, ROWS, BLOCK, STAGES, True, DTYPE, EACH,
        )  # fmt: skip
        laps += 1
    for n in range(blocks - whole, blocks):
        acc, p16, best, weight = _step(
            HALF, q, k_all, v_all, full, free, turns, acc, p16, best, weight, laps, done + n,
            last - n * BLOCK, reach, factor, ROWS, BLOCK, STAGES, False, DTYPE, EACH,
        )  # fmt: skip
        laps += 1
    release(q_done)
    stage = (done + blocks) % STAGES
    acc = warpgroup_mma(p16, v_all.index(stage * EACH), acc)
    release(free.index(stage))
    return acc, best, weight, done + blocks + 1, laps


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
        ROWS, BLOCK, M, STAGES, SINKS, RAGGED, DTYPE,
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
        row = told(item_buf, 1)
        pair = told(item_buf, 2)
        first = told(item_buf, 3)
        blocks = told(item_buf, 4)
        lanes = told(item_buf, 5)
        begin = told(item_buf, 6)
        queries = told(item_buf, 7)
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
            alone, top, share, done, laps = _far(
                HALF, q, k_all, v_one, v_one, full, free, turns, q_free.index(place), blocks,
                done, laps, reach, lowest, size + recent, factor, ROWS, BLOCK, D, STAGES, M,
                RAGGED, DTYPE,
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
                    acc, best, weight, done, laps = _far(
                        HALF, q, k_all, v_all, v_one, full, free, turns, q_free.index(place),
                        blocks, done, laps, reach, lowest, size + recent, factor, ROWS, BLOCK,
                        M * D, STAGES, 1, RAGGED, DTYPE,
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
    K_BYTES: gl.constexpr = BLOCK * D * 2
    V_BYTES: gl.constexpr = M * K_BYTES
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
        tell(item_buf, 0, 1)
        tell(item_buf, 1, row)
        tell(item_buf, 2, pair)
        tell(item_buf, 3, first)
        tell(item_buf, 4, blocks)
        tell(item_buf, 5, lanes)
        tell(item_buf, 6, begin)
        tell(item_buf, 7, queries)
        barrier()
        mbarrier.arrive(item_full, count=1)
        turn += 1
        if blocks > 0:
            _fetch_queries(q_tiles, q_bufs, q_full, q_free, asked, outer,
                           gl.load(query_ptr + pair), begin + first, ROWS)  # fmt: skip
            asked += 1
            key = gl.load(key_ptr + pair)
            for i in range(0, blocks + 1):
                stage = (done + i) % STAGES
                n = far + (blocks - 1 - i) * BLOCK
                bar = full.index(stage)
                mbarrier.wait(free.index(stage), (((done + i) // STAGES) & 1) ^ 1)
                has_k = i < blocks
                has_v = i > 0
                is_one = lanes == 1
                mbarrier.expect(bar, K_BYTES + V_BYTES, pred=has_k & has_v & (lanes > 1))
                mbarrier.expect(bar, 2 * K_BYTES, pred=has_k & has_v & is_one)
                mbarrier.expect(bar, K_BYTES, pred=(i == 0) | ((i == blocks) & is_one))
                mbarrier.expect(bar, V_BYTES, pred=(i == blocks) & (lanes > 1))
                _fetch_block(
                    k_tiles, k_bufs, bar, stage, outer, key, n, size, work_ptr, 0, 0, 1, has_k,
                    BLOCK, D, 0,
                )  # fmt: skip
                for member in gl.static_range(M):
                    # lanes without a member read any head, unused, but where there is one alone
                    place = gl.maximum(gl.load(value_ptr + pair * M + member), 0)
                    _fetch_block(
                        v_tiles, v_bufs, bar, stage, outer, place, n + BLOCK, size, work_ptr, 0,
                        member, M, has_v & ((lanes > 1) | (member == 0)), BLOCK, D, 0,
                    )  # fmt: skip
            done += blocks + 1
        for member in range(0, lanes):
            head = gl.load(head_ptr + pair * M + member)
            _fetch_queries(q_tiles, q_bufs, q_full, q_free, asked, outer, head, begin + first, ROWS)
            asked += 1
            done = fetch_local(
                local_k_tiles, local_v_tiles, k_one, v_one, full, free, done, outer,
                head // SHARED, past + first - recent + 1 + shift, begin, local,
                BLOCK, D, M, STAGES, SINKS,
            )  # fmt: skip
        item = gl.atomic_add(next_ptr, 1)
    # the end of the list, for the halves
    mbarrier.wait(item_free, (turn & 1) ^ 1)
    tell(item_buf, 0, 0)
    barrier()
    mbarrier.arrive(item_full, count=1)


@gluon.jit
def _fetch_queries(
    tiles, bufs, full, free, asked, outer, head, token, ROWS: gl.constexpr
):  # fmt: skip
    """Bring both halves' Q of a head to one of two places."""
    place = asked % 2
    mbarrier.wait(free.index(place), ((asked // 2) & 1) ^ 1)
    bar = full.index(place)
    mbarrier.expect(bar, 2 * tiles.block_type.nbytes)
    for half in gl.static_range(2):
        at = [outer, head, token + half * ROWS, 0]
        _fetch_tile(tiles, at, bar, bufs.index(place * 2 + half))


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
    q_shape: gl.constexpr = [4] + q_tiles.block_type.shape  # noqa: RUF005
    q_bufs = gl.allocate_shared_memory(DTYPE, q_shape, q_tiles.layout)
    k_shape: gl.constexpr = [STAGES] + k_tiles.block_type.shape  # noqa: RUF005
    k_bufs = gl.allocate_shared_memory(DTYPE, k_shape, k_tiles.layout)
    v_shape: gl.constexpr = [STAGES * M] + v_tiles.block_type.shape  # noqa: RUF005
    v_bufs = gl.allocate_shared_memory(DTYPE, v_shape, v_tiles.layout)
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    k_all = reinterpret(k_bufs, DTYPE, [STAGES, BLOCK, D], flat)
    v_all = reinterpret(v_bufs, DTYPE, [STAGES, BLOCK, M * D], flat)
    v_one = reinterpret(v_bufs, DTYPE, [STAGES * M, BLOCK, D], flat)
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
    if not HAS_OFFSET:
        offset_ptr = work_ptr
    if not HAS_IDS:
        ids_ptr = work_ptr
    if RAGGED:
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
