"""Prefill for Hopper GPUs, in Gluon: two warpgroups attend while one warp fetches.

The tile kernel of `prefill` leaves the tensor cores idle during the softmax. Here two consumer
warpgroups of 64 queries each take turns: one multiplies while the other exponentiates. Within a
warpgroup, the scores of a block are computed together with the product of the block before. A
third warpgroup only moves K and V to shared memory, with the tensor memory accelerator. Programs
stay on their processor and take tiles from a list, longest first.

It serves whole prompts and their continuations without padding, of equal length or packed, with
K and V in tensors or in pages; `prefill` serves the rest.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from chai_attention.ops.triton.hopper_fetch import (
    FIELDS,
    barrier,
    barriers,
    blocks_of,
    buffers,
    fetch,
    release,
    told,
    told_all,
)

LOG2_E = gl.constexpr(1.4426950408889634)
LOG_2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def _store_layout(width):
    """Layout of ``[64, width]`` outputs for the store: as of a product, but 16 bytes a thread."""
    columns = [[0, 1 << bit] for bit in range(width.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[*columns[:3], [8, 0], *columns[5:]],
        lane_bases=[*columns[3:5], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, width],
    )


@gluon.jit
def _blank(v_bufs, stage, stop, BLOCK: gl.constexpr, PIECES: gl.constexpr):
    """Zeros in place of V behind the first ``stop`` tokens of a block.

    Other sequences' V stands there, or anything: their weights are 0, but 0 times NaN is not.
    """
    BOX: gl.constexpr = v_bufs.shape[3]
    COLUMNS: gl.constexpr = v_bufs.shape[4]
    DOWN: gl.constexpr = BLOCK // BOX
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for piece in gl.static_range(PIECES):
        token = (piece % DOWN) * BOX + gl.arange(0, BOX, layout=gl.SliceLayout(1, spread))
        buffer = v_bufs.index(stage * PIECES + piece).reshape([BOX, COLUMNS])
        v = buffer.load(spread)
        buffer.store(gl.where(token[:, None] < stop, v, gl.zeros_like(v)))
    fence_async_shared()
    barrier()


@gluon.jit
def update(s, best, weight, factor, MASKED: gl.constexpr = True):
    """Weights of a block from its scores, factor of the sums so far, running maximum and sum."""
    new = gl.maximum(best, gl.max(s, axis=1) * factor)
    base = new
    if MASKED:
        base = gl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: weight 0, not NaN
    p = gl.exp2(s * factor - base[:, None])
    old = gl.exp2(best - base)
    return p, old, new, weight * old + gl.sum(p, axis=1)


@gluon.jit
def _softmax(
    s, best, weight, factor, at, position, MASKED: gl.constexpr, LOW: gl.constexpr = 0
):  # fmt: skip
    """`update`; MASKED: queries see keys from LOW on and up to their position."""
    if MASKED:
        seen = at[None, :] <= position[:, None]
        if LOW > 0:
            seen = seen & (at >= LOW)[None, :]
        s = gl.where(seen, s, float("-inf"))
    return update(s, best, weight, factor, MASKED)


@gluon.jit
def _step(
    HALF: gl.constexpr, q, k_all, v_all, full, free, turns, acc, p16, best, weight, laps, lap,
    first_key, position, factor,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    DTYPE: gl.constexpr, EACH: gl.constexpr = 1, LOW: gl.constexpr = 0,
):  # fmt: skip
    """Scores of one block, and the product of the one before with its V.

    A stage of ``v_all`` is every ``EACH``-th of its parts.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    weights: gl.constexpr = p16.type.layout
    out_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    zero = gl.full([ROWS, BLOCK], 0.0, gl.float32, layout=scores)
    stage = lap % STAGES
    # the halves take turns at the tensor cores
    mbarrier.wait(turns.index(HALF), (laps & 1) ^ (1 - HALF))
    k = k_all.index(stage).permute([1, 0])
    v = v_all.index(stage * EACH)
    at = first_key + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, scores))
    # both are computed together
    s_later = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    acc_later = warpgroup_mma(p16, v, acc, is_async=True)
    mbarrier.arrive(turns.index(1 - HALF), count=1)
    s = warpgroup_mma_wait(1, deps=[s_later])
    p, old, best, weight = _softmax(s, best, weight, factor, at, position, MASKED, LOW)
    # the loop in this wait keeps ptxas from moving the next wait, for the product, in front of
    # the softmax
    mbarrier.wait(full.index((lap + 1) % STAGES), ((lap + 1) // STAGES) & 1)
    acc, p16, p, old = warpgroup_mma_wait(0, deps=[acc_later, p16, p, old])
    release(free.index(stage))
    acc = acc * gl.convert_layout(old, out_row)[:, None]
    return acc, gl.convert_layout(p.to(DTYPE), weights), best, weight


@gluon.jit
def _attend(
    HALF: gl.constexpr, q_bufs, k_all, v_all, v_bufs, item_buf, q_full, q_free, full, free, turns,
    slot_ptr, head_ptr, out_ptr, lse_ptr, factor,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lk, stride_lq,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, RAGGED: gl.constexpr, HAS_LSE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Attend with one half of every tile's queries."""
    WIDTH: gl.constexpr = M * D
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    out_row: gl.constexpr = gl.SliceLayout(1, output)
    store: gl.constexpr = _store_layout(WIDTH)
    zero = gl.full([ROWS, BLOCK], 0.0, gl.float32, layout=scores)
    done = 0
    turn = 0
    laps = 0
    mbarrier.wait(q_full, 0)
    while told(item_buf, 0) > 0:
        row, pair, first, begin, queries, size = told_all(item_buf, 1, 7)
        blocks = blocks_of(first, queries, size, 2 * ROWS, BLOCK)
        # every query of both halves sees the first `whole` blocks whole; not the last block,
        # which is masked even where it need not be
        whole = gl.minimum(gl.maximum(size - queries + first + 1, 0) // BLOCK, blocks - 1)
        first += HALF * ROWS
        i = first + gl.arange(0, ROWS, layout=by_row)
        # rows beyond the last query compute something, but see no key that is not there
        position = gl.minimum(size - queries + i, size - 1)
        best = gl.full([ROWS], float("-inf"), gl.float32, layout=by_row)
        weight = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
        acc = gl.full([ROWS, WIDTH], 0.0, gl.float32, layout=output)
        q = q_bufs.index(HALF).reshape([ROWS, D])

        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        s = warpgroup_mma(q, k_all.index(stage).permute([1, 0]), zero, use_acc=False)
        last = (blocks - 1) * BLOCK
        at = last + gl.arange(0, BLOCK, layout=by_key)
        p, _old, best, weight = _softmax(s, best, weight, factor, at, position, True)
        p16 = gl.convert_layout(p.to(DTYPE), weights)
        release(free.index(stage))
        stage = (done + 1) % STAGES
        mbarrier.wait(full.index(stage), ((done + 1) // STAGES) & 1)
        if RAGGED:  # noqa: SIM102 - known when compiled
            if last + BLOCK > size:
                _blank(v_bufs, stage, size - last, BLOCK, v_bufs.shape[0] // STAGES)
        for n in range(1, blocks - whole):
            acc, p16, best, weight = _step(
                HALF, q, k_all, v_all, full, free, turns, acc, p16, best, weight, laps, done + n,
                last - n * BLOCK, position, factor,
                ROWS, BLOCK, STAGES, True, DTYPE,
            )  # fmt: skip
            laps += 1
        for n in range(blocks - whole, blocks):
            acc, p16, best, weight = _step(
                HALF, q, k_all, v_all, full, free, turns, acc, p16, best, weight, laps, done + n,
                last - n * BLOCK, position, factor,
                ROWS, BLOCK, STAGES, False, DTYPE,
            )  # fmt: skip
            laps += 1
        stage = (done + blocks) % STAGES
        release(q_free)
        turn += 1
        acc = warpgroup_mma(p16, v_all.index(stage), acc)
        release(free.index(stage))
        done += blocks + 1

        share = 1.0 / weight
        if RAGGED:
            share = gl.where(weight > 0, share, 0.0)  # a sequence may have no keys
        acc = acc * gl.convert_layout(share, out_row)[:, None]
        result = gl.convert_layout(acc.to(DTYPE), store)
        io = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, store))
        column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, store))
        head = gl.load(head_ptr + pair * M + column // D)
        token = (begin + io).to(gl.int64)
        target = out_ptr + row.to(gl.int64) * stride_ob + token[:, None] * stride_os
        target = target + (head * stride_oh + column % D)[None, :]
        gl.store(target, result, mask=(io[:, None] < queries) & (head[None, :] >= 0))
        if HAS_LSE:
            slot = gl.load(slot_ptr + pair)
            lse = (best + gl.log2(weight)) * LOG_2
            lse_base = lse_ptr + row.to(gl.int64) * stride_lb + slot.to(gl.int64) * stride_lk
            gl.store(lse_base + (begin + i).to(gl.int64) * stride_lq, lse, mask=i < queries)
        mbarrier.wait(q_full, turn & 1)


@gluon.jit(
    do_not_specialize=["queries", "size", "head_tiles", "tiles", "group", "batch", "stride_table"],
    do_not_specialize_on_alignment=["start_ptr", "length_ptr", "table_ptr", "ids_ptr"],
)
def prefill_hopper(
    q_tiles, k_tiles, v_tiles, next_ptr, work_ptr, count_ptr, start_ptr, length_ptr, table_ptr,
    ids_ptr, slot_ptr, query_ptr, key_ptr, head_ptr, value_ptr, out_ptr, lse_ptr,
    scale, queries, size, head_tiles, tiles, group, batch, stride_table, stride_t,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lk, stride_lq,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, RAGGED: gl.constexpr, PAGE: gl.constexpr, HAS_IDS: gl.constexpr,
    HAS_LENGTH: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """Tiles of 2 * ROWS queries and a head tile of M members each, from a list, longest first.

    RAGGED: queries are packed, as are K and V unless they are in pages of PAGE tokens; the list
    is `hopper_work.plan`'s. Else it is the head tiles that have work.
    """
    DTYPE: gl.constexpr = q_tiles.dtype
    q_bufs, k_bufs, v_bufs, k_all, v_all, _one = buffers(
        q_tiles, k_tiles, v_tiles, 2, STAGES, BLOCK, D, M
    )
    item_buf, q_full, q_free, _full, _free, full, free, turns = barriers(FIELDS, STAGES, False)
    if not HAS_LSE:
        lse_ptr = out_ptr
    # functions take no None
    if not RAGGED:
        start_ptr = work_ptr
    if not HAS_LENGTH:
        length_ptr = work_ptr
    if PAGE == 0:
        table_ptr = work_ptr
    if not HAS_IDS:
        ids_ptr = work_ptr
    if RAGGED:
        next_ptr = work_ptr + batch + 1
        pairs = 0
        items = gl.load(work_ptr + batch)
    else:
        pairs = gl.load(count_ptr)
        items = pairs * tiles
    factor = scale * LOG2_E
    gl.warp_specialize([
        (_attend, (
            0, q_bufs, k_all, v_all, v_bufs, item_buf, q_full, q_free, full, free, turns,
            slot_ptr, head_ptr, out_ptr, lse_ptr, factor,
            stride_ob, stride_os, stride_oh, stride_lb, stride_lk, stride_lq,
            ROWS, BLOCK, D, M, STAGES, RAGGED, HAS_LSE, DTYPE)),
        (_attend, (
            1, q_bufs, k_all, v_all, v_bufs, item_buf, q_full, q_free, full, free, turns,
            slot_ptr, head_ptr, out_ptr, lse_ptr, factor,
            stride_ob, stride_os, stride_oh, stride_lb, stride_lk, stride_lq,
            ROWS, BLOCK, D, M, STAGES, RAGGED, HAS_LSE, DTYPE)),
        (fetch, (
            q_tiles, k_tiles, v_tiles, q_bufs, k_bufs, v_bufs, item_buf, q_full, q_free, full,
            free, next_ptr, work_ptr, start_ptr, length_ptr, table_ptr, ids_ptr, query_ptr,
            key_ptr, value_ptr, items, pairs, tiles, group, head_tiles, queries, size, batch,
            stride_table, stride_t,
            ROWS, BLOCK, D, M, STAGES, RAGGED, PAGE, HAS_IDS, HAS_LENGTH)),
    ], [4, 1], [240, 24])  # fmt: skip
