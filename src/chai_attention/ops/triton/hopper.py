"""Prefill for Hopper GPUs, in Gluon: two warpgroups attend while one warp fetches.

The tile kernel of `prefill` leaves the tensor cores idle during the softmax. Here two consumer
warpgroups of 64 queries each take turns: one multiplies while the other exponentiates. Within a
warpgroup, the scores of a block are computed together with the product of the block before. A
third warpgroup only moves K and V to shared memory, with the tensor memory accelerator. Programs
stay on their processor and take tiles from a list, longest first.

It serves whole prompts and their continuations without padding; `prefill` serves the rest.
"""

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from chai_attention.membership import Membership
from chai_attention.ops.triton.chunks import Chunks
from chai_attention.ops.triton.device import processors
from chai_attention.ops.triton.prefill import group_of, tileable

# two names that later versions of Triton changed
_fetch_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

LOG2_E = gl.constexpr(1.4426950408889634)
LOG_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _work(item, work_ptr, pairs, tiles, group, chunks, queries, size, ROWS: gl.constexpr,
          BLOCK: gl.constexpr):  # fmt: skip
    """What an item of the list is: batch row, chunk, first query, blocks of keys.

    Chunks come in groups, which share the L2 cache; within a group the longest tiles come first.
    """
    start = item // (group * tiles) * group
    width = gl.minimum(group, pairs - start)
    inside = item - start * tiles
    tile = tiles - 1 - inside // width  # the last queries see the most keys
    pair = gl.load(work_ptr + start + inside % width)
    first = tile * (2 * ROWS)
    stop = gl.minimum(size, size - queries + first + 2 * ROWS)
    return pair // chunks, pair, first, (stop + BLOCK - 1) // BLOCK


@gluon.jit
def _fetch(
    q_tiles, k_tiles, v_tiles, q_bufs, k_bufs, v_bufs, item_buf, q_full, q_free, full, free,
    next_ptr, work_ptr, slot_ptr, key_ptr, value_ptr, pairs, tiles, group, chunks, queries, size,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Take items from the list and bring their Q, K and V to shared memory.

    A stage of the ring holds K of one block and V of the block before, as the halves need them.
    """
    K_BYTES: gl.constexpr = k_tiles.block_type.nbytes
    V_BYTES: gl.constexpr = v_tiles.block_type.nbytes
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    done = 0
    turn = 0
    item = gl.atomic_add(next_ptr, 1)
    while item < pairs * tiles:
        row, pair, first, blocks = _work(
            item, work_ptr, pairs, tiles, group, chunks, queries, size, ROWS, BLOCK
        )
        slot = gl.load(slot_ptr + pair)
        key = gl.load(key_ptr + pair)
        column = gl.load(value_ptr + pair * M) * D
        mbarrier.wait(q_free, (turn & 1) ^ 1)
        item_buf.store(gl.full([1], item, gl.int32, layout=one))
        _barrier()
        mbarrier.expect(q_full, 2 * q_tiles.block_type.nbytes)
        for half in gl.static_range(2):
            _fetch_tile(q_tiles, [row, slot, first + half * ROWS, 0], q_full, q_bufs.index(half))
        for i in range(0, blocks + 1):
            stage = (done + i) % STAGES
            n = (blocks - 1 - i) * BLOCK
            bar = full.index(stage)
            mbarrier.wait(free.index(stage), (((done + i) // STAGES) & 1) ^ 1)
            has_k = i < blocks
            has_v = i > 0
            mbarrier.expect(bar, K_BYTES + V_BYTES, pred=has_k & has_v)
            mbarrier.expect(bar, K_BYTES, pred=i == 0)
            mbarrier.expect(bar, V_BYTES, pred=i == blocks)
            _fetch_tile(k_tiles, [row, key, n, 0], bar, k_bufs.index(stage), pred=has_k)
            _fetch_tile(v_tiles, [row, n + BLOCK, column], bar, v_bufs.index(stage), pred=has_v)
        done += blocks + 1
        turn += 1
        item = gl.atomic_add(next_ptr, 1)
    # the end of the list, for the halves
    mbarrier.wait(q_free, (turn & 1) ^ 1)
    item_buf.store(gl.full([1], item, gl.int32, layout=one))
    _barrier()
    mbarrier.arrive(q_full, count=1)


@gluon.constexpr_function
def _lines(width):
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
def _release(bar):
    """Say that this warpgroup, all of its warps, is through with a buffer."""
    _barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _softmax(s, best, weight, factor, at, position, masked):
    """Weights of a block, factor of the sums so far, running maximum and sum."""
    if masked:
        s = gl.where(at[None, :] <= position[:, None], s, float("-inf"))
    new = gl.maximum(best, gl.max(s, axis=1) * factor)
    base = gl.where(new == float("-inf"), 0.0, new)  # a row may have seen nothing yet
    p = gl.exp2(s * factor - base[:, None])
    old = gl.exp2(best - base)
    return p, old, new, weight * old + gl.sum(p, axis=1)


@gluon.jit
def _attend(
    HALF: gl.constexpr, q_bufs, k_bufs, v_bufs, item_buf, q_full, q_free, full, free, turns,
    work_ptr, slot_ptr, head_ptr, out_ptr, lse_ptr, pairs, tiles, group, chunks, clusters,
    queries, size, factor, stride_ob, stride_os, stride_oh,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, HAS_LSE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Attend with one half of every tile's queries."""
    WIDTH: gl.constexpr = M * D
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    out_row: gl.constexpr = gl.SliceLayout(1, output)
    # the product's rows and warps, but 16 consecutive bytes a thread
    lines: gl.constexpr = _lines(WIDTH)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zero = gl.full([ROWS, BLOCK], 0.0, gl.float32, layout=scores)
    done = 0
    turn = 0
    laps = 0
    mbarrier.wait(q_full, 0)
    item = gl.max(item_buf.load(one), axis=0)
    while item < pairs * tiles:
        row, pair, first, blocks = _work(
            item, work_ptr, pairs, tiles, group, chunks, queries, size, ROWS, BLOCK
        )
        # every query of both halves sees the first `whole` blocks whole
        whole = (size - queries + first + 1) // BLOCK
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
        k = k_bufs.index(stage).reshape([BLOCK, D]).permute([1, 0])
        s = warpgroup_mma(q, k, zero, use_acc=False)
        at = (blocks - 1) * BLOCK + gl.arange(0, BLOCK, layout=by_key)
        p, old, best, weight = _softmax(s, best, weight, factor, at, position, blocks > whole)
        p16 = gl.convert_layout(p.to(DTYPE), weights)
        _release(free.index(stage))
        mbarrier.wait(full.index((done + 1) % STAGES), ((done + 1) // STAGES) & 1)
        for n in range(1, blocks):
            stage = (done + n) % STAGES
            # the halves take turns at the tensor cores
            mbarrier.wait(turns.index(HALF), (laps & 1) ^ (1 - HALF))
            # scores of this block and the product of the one before are computed together
            k = k_bufs.index(stage).reshape([BLOCK, D]).permute([1, 0])
            s_later = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            v = v_bufs.index(stage).reshape([BLOCK, WIDTH])
            acc_later = warpgroup_mma(p16, v, acc, is_async=True)
            mbarrier.arrive(turns.index(1 - HALF), count=1)
            laps += 1
            s = warpgroup_mma_wait(1, deps=[s_later])
            at = (blocks - 1 - n) * BLOCK + gl.arange(0, BLOCK, layout=by_key)
            p, old, best, weight = _softmax(
                s, best, weight, factor, at, position, blocks - n > whole
            )
            # the loop in this wait keeps ptxas from moving the next wait, for the product, in
            # front of the softmax
            mbarrier.wait(full.index((done + n + 1) % STAGES), ((done + n + 1) // STAGES) & 1)
            acc, p16, p, old = warpgroup_mma_wait(0, deps=[acc_later, p16, p, old])
            _release(free.index(stage))
            acc = acc * gl.convert_layout(old, out_row)[:, None]
            p16 = gl.convert_layout(p.to(DTYPE), weights)
        stage = (done + blocks) % STAGES
        _release(q_free)
        turn += 1
        v = v_bufs.index(stage).reshape([BLOCK, WIDTH])
        acc = warpgroup_mma(p16, v, acc)
        _release(free.index(stage))
        done += blocks + 1

        acc = acc * gl.convert_layout(1.0 / weight, out_row)[:, None]
        result = gl.convert_layout(acc.to(DTYPE), lines)
        io = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, lines))
        column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, lines))
        head = gl.load(head_ptr + pair * M + column // D)
        target = out_ptr + row.to(gl.int64) * stride_ob + io[:, None].to(gl.int64) * stride_os
        target = target + (head * stride_oh + column % D)[None, :]
        gl.store(target, result, mask=(io[:, None] < queries) & (head[None, :] >= 0))
        if HAS_LSE:
            slot = gl.load(slot_ptr + pair)
            lse = (best + gl.log2(weight)) * LOG_2
            gl.store(
                lse_ptr + (row * clusters + slot).to(gl.int64) * queries + i, lse, mask=i < queries
            )
        mbarrier.wait(q_full, turn & 1)
        item = gl.max(item_buf.load(one), axis=0)


@gluon.jit(do_not_specialize=["queries", "size", "chunks", "clusters", "tiles", "group"])
def _prefill_hopper(
    q_tiles, k_tiles, v_tiles, next_ptr, work_ptr, count_ptr,
    slot_ptr, key_ptr, head_ptr, value_ptr, out_ptr, lse_ptr,
    scale, queries, size, chunks, clusters, tiles, group, stride_ob, stride_os, stride_oh,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """Tiles of 2 * ROWS queries and one chunk of M members each, from a list, longest first."""
    DTYPE: gl.constexpr = q_tiles.dtype
    q_shape: gl.constexpr = [2] + q_tiles.block_type.shape  # noqa: RUF005
    q_bufs = gl.allocate_shared_memory(DTYPE, q_shape, q_tiles.layout)
    k_shape: gl.constexpr = [STAGES] + k_tiles.block_type.shape  # noqa: RUF005
    k_bufs = gl.allocate_shared_memory(DTYPE, k_shape, k_tiles.layout)
    v_shape: gl.constexpr = [STAGES] + v_tiles.block_type.shape  # noqa: RUF005
    v_bufs = gl.allocate_shared_memory(DTYPE, v_shape, v_tiles.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    item_buf = gl.allocate_shared_memory(gl.int32, [1], shared)
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)  # both halves have to be through
    for half in gl.static_range(2):
        mbarrier.init(turns.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    if not HAS_LSE:
        lse_ptr = out_ptr
    pairs = gl.load(count_ptr)
    factor = scale * LOG2_E
    gl.warp_specialize([
        (_attend, (
            0, q_bufs, k_bufs, v_bufs, item_buf, q_full, q_free, full, free, turns,
            work_ptr, slot_ptr, head_ptr, out_ptr, lse_ptr, pairs, tiles, group, chunks, clusters,
            queries, size, factor, stride_ob, stride_os, stride_oh,
            ROWS, BLOCK, D, M, STAGES, HAS_LSE, DTYPE)),
        (_attend, (
            1, q_bufs, k_bufs, v_bufs, item_buf, q_full, q_free, full, free, turns,
            work_ptr, slot_ptr, head_ptr, out_ptr, lse_ptr, pairs, tiles, group, chunks, clusters,
            queries, size, factor, stride_ob, stride_os, stride_oh,
            ROWS, BLOCK, D, M, STAGES, HAS_LSE, DTYPE)),
        (_fetch, (
            q_tiles, k_tiles, v_tiles, q_bufs, k_bufs, v_bufs, item_buf, q_full, q_free, full,
            free, next_ptr, work_ptr, slot_ptr, key_ptr, value_ptr, pairs, tiles, group, chunks,
            queries, size, ROWS, BLOCK, D, M, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


ROWS, BLOCK, STAGES = 64, 64, 3
WIDTHS = (128, 256)  # columns of V a program can hold, of all its members


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunks: Chunks,
    out: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
) -> None:
    """Write ``out [B, Q, H, Dv]`` for ``query [B, k, Q, D]``; see `ops.reference.attention`."""
    batch, clusters, queries, dim = query.shape
    groups, size, value_dim = value.shape[1:]
    members = chunks.head.shape[2]
    tiles = triton.cdiv(queries, 2 * ROWS)
    work, count = chunks.used
    _prefill_hopper[(min(processors(query.device), tiles * chunks.count * batch),)](
        _tiles(query, query.shape, query.stride(), [1, 1, ROWS, dim]),
        _tiles(key, key.shape, key.stride(), [1, 1, BLOCK, dim]),
        _tiles(
            value,
            (batch, size, groups * value_dim),
            (value.stride(0), value.stride(2), 1),
            [1, BLOCK, members * value_dim],
        ),
        torch.zeros(1, dtype=torch.int32, device=query.device),  # the next item of the list
        work, count, chunks.slot, chunks.key, chunks.head, chunks.value, out, lse,
        scale, queries, size, chunks.count, clusters, tiles, group_of(tiles), *out.stride()[:3],
        ROWS=ROWS, BLOCK=BLOCK, D=dim, M=members, STAGES=STAGES, HAS_LSE=lse is not None,
        num_warps=4,
    )  # fmt: skip


def fits(query: Tensor, key: Tensor, value: Tensor, membership: Membership, members: int) -> bool:
    """Whether this kernel can run these tensors: head sizes 64 and 128, 16-bit, aligned."""
    dim, value_dim = query.shape[3], value.shape[3]
    aligned = query.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in query.stride()[:3])
    return (
        query.dtype.itemsize == 2
        and dim == value_dim
        and dim in (64, 128)
        and members > 1
        and members * dim in WIDTHS
        and query.shape[2] <= key.shape[2]
        and aligned
        and tileable(key, value, membership.group_size > 1)
    )


def _tiles(
    tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: list[int]
) -> TensorDescriptor:
    """Describe a tensor to the tensor memory accelerator, in tiles of ``block``."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(tensor, list(shape), list(strides), block, layout)
