"""Decode for Hopper GPUs, in Gluon: parts of the far keys by the tensor cores, K and V as they lie.

One query has so little work per byte that instructions, not bytes, can limit a kernel:
`decode_parts` loads every number of K and V to registers, widens it and multiplies it there. Here
one warp only asks the tensor memory accelerator for tiles of K and V, and the tensor cores read
them from shared memory: scores are ``K q`` and outputs ``V^T p``, so that 64 keys or columns of V
fill the rows of a product and the query is one of 8 columns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)
from triton.language.extra.cuda import gdc_launch_dependents

from chai_attention.ops.triton.hopper_fetch import _fetch_tile, barrier

LOG2_E = gl.constexpr(1.4426950408889634)
BLOCK = gl.constexpr(64)  # keys of a step, the rows of a product
COLUMNS = gl.constexpr(8)  # of a product, the fewest there are


@gluon.jit
def _scores_base2(s, softcap, HAS_SOFTCAP: gl.constexpr):
    """`decode._scores_base2`, which the other language does not take."""
    if HAS_SOFTCAP:
        x = s / softcap
        e = gl.exp2(gl.abs(x) * (-2 * LOG2_E))
        far = gl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        y = x * x
        series = 1 - y * (1 / 3 - y * (2 / 15 - y * (17 / 315 - y * (62 / 2835))))
        s = softcap * gl.where(gl.abs(x) < 0.25, x * series, far)
    return s * LOG2_E


@gluon.jit
def _fetch(
    k_tiles, v_tiles, tile_bufs, full, free, table, place_ptr, key, count, start, stop,
    SLOTS: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Bring K of a block, then V of its members, to one place after another of a ring."""
    slot = 0
    phase = 1
    for first in range(start, stop, BLOCK):
        page = gl.load(table + first // PAGE)
        at = first % PAGE
        for member in range(0, count + 1):
            mbarrier.wait(free.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, k_tiles.block_type.nbytes)
            if member == 0:
                _fetch_tile(k_tiles, [page, key, at, 0], bar, tile_bufs.index(slot))
            else:
                place = gl.load(place_ptr + member - 1)
                _fetch_tile(v_tiles, [page, place, at, 0], bar, tile_bufs.index(slot))
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1


@gluon.jit
def _blank(buffer, there, D: gl.constexpr):
    """Zeros in place of V behind the first ``there`` tokens of a tile.

    Anything may stand there: its weights are 0, but 0 times NaN is not.
    """
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    token = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, spread))
    v = buffer.load(spread)
    buffer.store(gl.where(token[:, None] < there, v, gl.zeros_like(v)))
    fence_async_shared()
    barrier()


@gluon.jit
def _attend(
    tile_bufs, q_buf, p_buf, full, free, acc_ptr, sum_ptr, count, start, stop, begin, scale,
    softcap, D: gl.constexpr, M: gl.constexpr, SLOTS: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Weights of every block and, with them, the sums of V of all members."""
    # of scores and of outputs: keys or columns of V by columns that are all the same query
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    by_column: gl.constexpr = gl.SliceLayout(0, layout)
    zero = gl.full([BLOCK, COLUMNS], 0.0, gl.float32, layout=layout)
    q = q_buf.permute([1, 0])
    p_all = p_buf.permute([1, 0])
    best = gl.full([COLUMNS], float("-inf"), gl.float32, layout=by_column)
    weight = zero
    none = gl.full([D, COLUMNS], 0.0, gl.float32, layout=layout)
    sums = (none,) * M
    even = (gl.arange(0, COLUMNS, layout=by_column) % 2 == 0)[None, :]
    token = gl.arange(0, BLOCK, layout=by_row)
    slot = 0
    phase = 0
    for first in range(start, stop, BLOCK):
        mbarrier.wait(full.index(slot), phase)
        s = warpgroup_mma(tile_bufs.index(slot).reshape([BLOCK, D]), q, zero, use_acc=False)
        k_free = free.index(slot)
        slot += 1
        if slot == SLOTS:
            slot = 0
            phase ^= 1
        s = _scores_base2(s * scale, softcap, HAS_SOFTCAP)
        n = first + token
        s = gl.where(((n >= begin) & (n < stop))[:, None], s, float("-inf"))
        new = gl.maximum(best, gl.max(s, axis=0))
        base = gl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: weight 0, not NaN
        p = gl.exp2(s - base[None, :])
        old = gl.exp2(best - base)
        best = new
        weight = weight * old[None, :] + p
        # what rounding takes off a weight goes to the column beside it: products with 16 bits add
        # up to those with about 16 digits
        local = p.to(DTYPE)
        rest = (p - local.to(gl.float32)).to(DTYPE)
        p_all.store(gl.where(even, local, rest))
        fence_async_shared()
        barrier()
        mbarrier.arrive(k_free, count=1)
        made = ()
        for member in gl.static_range(M):
            out = sums[member]
            if member < count:
                mbarrier.wait(full.index(slot), phase)
                v = tile_bufs.index(slot).reshape([BLOCK, D])
                if first + BLOCK > stop:
                    _blank(v, stop - first, D)
                out = warpgroup_mma(v.permute([1, 0]), p_all, out * old[None, :])
                barrier()
                mbarrier.arrive(free.index(slot), count=1)
                slot += 1
                if slot == SLOTS:
                    slot = 0
                    phase ^= 1
            made = made + (out,)  # type: ignore[assignment]  # noqa: RUF005
        sums = made
    column = gl.arange(0, COLUMNS, layout=by_column)
    dv = gl.arange(0, D, layout=by_row)
    for member in gl.static_range(M):
        out = gl.sum(gl.where((column < 2)[None, :], sums[member], 0.0), axis=1)
        gl.store(acc_ptr + member * D + dv, out)
    total = gl.sum(weight, axis=0)
    gl.store(sum_ptr + column * 0, best, mask=column == 0)
    gl.store(sum_ptr + 1 + column * 0, total, mask=column == 0)


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    """Barriers of a ring's places: of those that are full, and of those that are free."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [COUNT, 1], bar)
    for place in gl.static_range(COUNT):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(free.index(place), count=1)
    return full, free


@gluon.jit(
    do_not_specialize=["head_tiles", "streaming", "splits", "recent", "stride_table", "stride_t"],
    do_not_specialize_on_alignment=[
        "length_ptr",
        "table_ptr",
        "ids_ptr",
        "query_ptr",
        "key_ptr",
        "value_ptr",
    ],
)
def parts(
    k_tiles, v_tiles, q_ptr, length_ptr, table_ptr, ids_ptr, query_ptr, key_ptr, value_ptr,
    acc_ptr, sum_ptr, scale, softcap, head_tiles, streaming, splits, recent, stride_qb, stride_qk,
    stride_table, stride_t,
    D: gl.constexpr, M: gl.constexpr, PAGE: gl.constexpr, SLOTS: gl.constexpr,
    SINKS: gl.constexpr, HAS_IDS: gl.constexpr, HAS_LOCAL: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One head tile, one split of the far keys, as `decode_parts._parts` without a window.

    ``HAS_LOCAL``: the last ``recent`` keys and the first ``SINKS`` are not far, and the sums have
    room for the members' nearest keys.
    """
    # what comes next may take the processors as soon as no program of this kernel waits for one;
    # it waits itself for the end of this kernel
    gdc_launch_dependents()
    program = gl.program_id(0)
    far = head_tiles - streaming
    head_tile = program % far + streaming
    program = program // far
    split = program % splits
    row = (program // splits).to(gl.int64)
    membership_id = row
    if HAS_IDS:
        membership_id = gl.load(ids_ptr + row).to(gl.int64)
    pair = membership_id * stride_t * head_tiles + head_tile
    head = gl.load(query_ptr + pair)
    if head >= 0:
        key = gl.load(key_ptr + pair)
        count = 0
        for member in gl.static_range(M):
            count += (gl.load(value_ptr + pair * M + member) >= 0).to(gl.int32)
        length = gl.load(length_ptr + row).to(gl.int32)
        begin = 0
        sets = splits
        lists = splits
        if HAS_LOCAL:
            length -= recent
            begin = SINKS
            sets += 1
            lists += M
        base = begin // BLOCK * BLOCK
        each = gl.cdiv(gl.cdiv(gl.maximum(length - base, 0), BLOCK), splits) * BLOCK
        start = base + split * each
        stop = gl.minimum(start + each, length)

        DTYPE: gl.constexpr = k_tiles.dtype
        ring: gl.constexpr = [SLOTS] + k_tiles.block_type.shape  # noqa: RUF005
        tile_bufs = gl.allocate_shared_memory(k_tiles.dtype, ring, k_tiles.layout)
        flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        q_buf = gl.allocate_shared_memory(DTYPE, [COLUMNS, D], flat)
        p_buf = gl.allocate_shared_memory(DTYPE, [COLUMNS, BLOCK], flat)
        full, free = _barriers(SLOTS)
        spread: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        d = gl.arange(0, D, layout=gl.SliceLayout(0, spread))
        copies = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, spread)) * 0
        q = gl.load(q_ptr + row * stride_qb + head * stride_qk + copies[:, None] + d[None, :])
        q_buf.store(q)
        part = row * head_tiles + head_tile
        acc_at = acc_ptr + (part * sets + split) * (M * D)
        sum_at = sum_ptr + (part * lists + split) * 2
        table = table_ptr + row * stride_table
        places = value_ptr + pair * M
        fence_async_shared()
        gl.warp_specialize([
            (_attend, (
                tile_bufs, q_buf, p_buf, full, free, acc_at, sum_at, count, start, stop, begin,
                scale, softcap, D, M, SLOTS, HAS_SOFTCAP, DTYPE)),
            (_fetch, (
                k_tiles, v_tiles, tile_bufs, full, free, table, places, key, count, start, stop,
                SLOTS, PAGE)),
        ], [1], [24])  # fmt: skip
