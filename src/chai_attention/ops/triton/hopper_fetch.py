"""The part of the Hopper kernel that brings Q, K and V to shared memory."""

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from chai_attention.ops.triton.hopper_work import dense_work, packed_work

# three names that later versions of Triton changed
_fetch_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret

FIELDS = gl.constexpr(7)  # of an item in shared memory: whether there is one, and `*_work`


@gluon.jit
def tell(item_buf, field: gl.constexpr, number):
    """Write one field of an item, for the halves."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    item_buf.index(field).store(gl.full([1], number, gl.int32, layout=one))


@gluon.jit
def told(item_buf, field: gl.constexpr):
    """Read one field."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(item_buf.index(field).load(one), axis=0)


@gluon.jit
def blocks_of(first, queries, size, TILE: gl.constexpr, BLOCK: gl.constexpr):
    """Blocks of keys that a tile of queries sees; at least one, which may be masked all."""
    stop = gl.minimum(size, size - queries + first + TILE)
    return gl.maximum((stop + BLOCK - 1) // BLOCK, 1)


@gluon.jit
def _fetch_block(
    tiles, bufs, bar, stage, row, head, n, size, table_ptr, stride_table, GROUP: gl.constexpr,
    GROUPS: gl.constexpr, pred,
    BLOCK: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Bring a block of one head's K or V, from token ``n`` on, to its place in a stage."""
    BOX: gl.constexpr = tiles.block_type.shape[2]
    COLUMNS: gl.constexpr = tiles.block_type.shape[3]
    ACROSS: gl.constexpr = D // COLUMNS
    DOWN: gl.constexpr = BLOCK // BOX
    for j in gl.static_range(DOWN):
        at = n + j * BOX
        if PAGE > 0:
            # boxes behind the last key come from its page, whatever stands there: unused
            inside = gl.maximum(gl.minimum(at, size - 1), 0)
            outer = gl.load(table_ptr + row.to(gl.int64) * stride_table + inside // PAGE)
            at = gl.maximum(at, 0) % PAGE
        else:
            outer = row
        for c in gl.static_range(ACROSS):
            place = ((stage * GROUPS + GROUP) * ACROSS + c) * DOWN + j
            _fetch_tile(tiles, [outer, head, at, c * COLUMNS], bar, bufs.index(place), pred=pred)


@gluon.jit
def fetch(
    q_tiles, k_tiles, v_tiles, q_bufs, k_bufs, v_bufs, item_buf, q_full, q_free, full, free,
    next_ptr, work_ptr, start_ptr, length_ptr, table_ptr, ids_ptr, query_ptr, key_ptr, value_ptr,
    items, pairs, tiles, group, head_tiles, queries, size, batch, stride_table, stride_t,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, RAGGED: gl.constexpr, PAGE: gl.constexpr, HAS_IDS: gl.constexpr,
    HAS_LENGTH: gl.constexpr,
):  # fmt: skip
    """Take items from the list and bring their Q, K and V to shared memory.

    A stage of the ring holds K of one block and V of the block before, as the halves need them.
    """
    K_BYTES: gl.constexpr = BLOCK * D * 2
    V_BYTES: gl.constexpr = M * K_BYTES
    done = 0
    turn = 0
    row = 0
    item = gl.atomic_add(next_ptr, 1)
    while item < items:
        if RAGGED:
            row, pair, first, begin, count, keys = packed_work(
                item, row, work_ptr, start_ptr, length_ptr, ids_ptr, head_tiles, batch, stride_t,
                HAS_IDS, HAS_LENGTH, 2 * ROWS,
            )  # fmt: skip
            outer = 0  # of the tensors: all sequences are in one
        else:
            row, pair, first, begin, count, keys = dense_work(
                item, work_ptr, pairs, tiles, group, head_tiles, queries, size, 2 * ROWS
            )
            outer = row
        head = gl.load(query_ptr + pair)
        key = gl.load(key_ptr + pair)
        mbarrier.wait(q_free, (turn & 1) ^ 1)
        tell(item_buf, 0, 1)
        tell(item_buf, 1, row)
        tell(item_buf, 2, pair)
        tell(item_buf, 3, first)
        tell(item_buf, 4, begin)
        tell(item_buf, 5, count)
        tell(item_buf, 6, keys)
        barrier()
        mbarrier.expect(q_full, 2 * q_tiles.block_type.nbytes)
        for half in gl.static_range(2):
            _fetch_tile(
                q_tiles, [outer, head, begin + first + half * ROWS, 0], q_full, q_bufs.index(half)
            )
        if PAGE > 0:
            outer = row
            begin = 0
        blocks = blocks_of(first, count, keys, 2 * ROWS, BLOCK)
        for i in range(0, blocks + 1):
            stage = (done + i) % STAGES
            n = begin + (blocks - 1 - i) * BLOCK
            bar = full.index(stage)
            mbarrier.wait(free.index(stage), (((done + i) // STAGES) & 1) ^ 1)
            has_k = i < blocks
            has_v = i > 0
            mbarrier.expect(bar, K_BYTES + V_BYTES, pred=has_k & has_v)
            mbarrier.expect(bar, K_BYTES, pred=i == 0)
            mbarrier.expect(bar, V_BYTES, pred=i == blocks)
            _fetch_block(
                k_tiles, k_bufs, bar, stage, outer, key, n, keys, table_ptr, stride_table, 0, 1,
                has_k, BLOCK, D, PAGE,
            )  # fmt: skip
            for member in gl.static_range(M):
                # lanes without a member read any head, unused
                place = gl.maximum(gl.load(value_ptr + pair * M + member), 0)
                _fetch_block(
                    v_tiles, v_bufs, bar, stage, outer, place, n + BLOCK, keys, table_ptr,
                    stride_table, member, M, has_v, BLOCK, D, PAGE,
                )  # fmt: skip
        done += blocks + 1
        turn += 1
        item = gl.atomic_add(next_ptr, 1)
    # the end of the list, for the halves
    mbarrier.wait(q_free, (turn & 1) ^ 1)
    tell(item_buf, 0, 0)
    barrier()
    mbarrier.arrive(q_full, count=1)
