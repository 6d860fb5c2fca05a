"""What Hopper's prefill kernels share: memory, barriers, and how Q, K and V come to it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from chai_attention.ops.triton.hopper_work import dense_work, packed_work

# three names that later versions of Triton changed
_fetch_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret

FIELDS = gl.constexpr(7)  # of an item in shared memory: whether there is one, and `*_work`


@gluon.jit
def tell(item_buf, numbers):
    """Write the fields of an item, for the halves."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for field in gl.static_range(len(numbers)):
        item_buf.index(field).store(gl.full([1], numbers[field], gl.int32, layout=one))
    barrier()


@gluon.jit
def told(item_buf, field: gl.constexpr):
    """Read one field."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(item_buf.index(field).load(one), axis=0)


@gluon.jit
def told_all(item_buf, FIRST: gl.constexpr, STOP: gl.constexpr):
    """Read the fields from one on and up to another one."""
    made = ()
    for field in gl.static_range(FIRST, STOP):
        made = made + (told(item_buf, field),)  # type: ignore[assignment]  # noqa: RUF005
    return made


@gluon.jit
def finish(item_buf, full, free, turn):
    """Tell the halves that the list has ended."""
    mbarrier.wait(free, (turn & 1) ^ 1)
    tell(item_buf, (0,))
    mbarrier.arrive(full, count=1)


@gluon.jit
def release(bar):
    """Say that this warpgroup, all of its warps, is through with a buffer."""
    barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def buffers(
    q_tiles, k_tiles, v_tiles, PLACES: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr,
    D: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """Shared memory: ``PLACES`` of Q; pieces of K and V; K and V of blocks, and V of a member.

    It is filled piece by piece; pieces lie as the parts of the whole block's tile do.
    """
    DTYPE: gl.constexpr = q_tiles.dtype
    q_shape: gl.constexpr = [PLACES] + q_tiles.block_type.shape  # noqa: RUF005
    q_bufs = gl.allocate_shared_memory(DTYPE, q_shape, q_tiles.layout)
    pieces: gl.constexpr = STAGES * BLOCK * D // (k_tiles.block_type.nbytes // 2)
    k_shape: gl.constexpr = [pieces] + k_tiles.block_type.shape  # noqa: RUF005
    k_bufs = gl.allocate_shared_memory(DTYPE, k_shape, k_tiles.layout)
    v_shape: gl.constexpr = [pieces * M] + v_tiles.block_type.shape  # noqa: RUF005
    v_bufs = gl.allocate_shared_memory(DTYPE, v_shape, v_tiles.layout)
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    k_all = reinterpret(k_bufs, DTYPE, [STAGES, BLOCK, D], flat)
    v_all = reinterpret(v_bufs, DTYPE, [STAGES, BLOCK, M * D], flat)
    v_one = reinterpret(v_bufs, DTYPE, [STAGES * M, BLOCK, D], flat)
    return q_bufs, k_bufs, v_bufs, k_all, v_all, v_one


@gluon.jit
def barriers(FIELDS: gl.constexpr, STAGES: gl.constexpr, OWN_Q: gl.constexpr):
    """Memory of an item; barriers of it, of two places of Q, of stages, of the halves' turns.

    Without ``OWN_Q`` an item comes with its Q, and one barrier is of both.
    """
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    item_buf = gl.allocate_shared_memory(gl.int32, [FIELDS, 1], shared)
    item_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    item_free = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = item_full
    q_free = item_free
    if OWN_Q:
        q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
        q_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(item_full, count=1)
    mbarrier.init(item_free, count=2)  # both halves have to be through
    for place in gl.static_range(2):
        mbarrier.init(turns.index(place), count=1)
        if OWN_Q:
            mbarrier.init(q_full.index(place), count=1)
            mbarrier.init(q_free.index(place), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    return item_buf, item_full, item_free, q_full, q_free, full, free, turns


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
def block_at(i, blocks, LOW: gl.constexpr):
    """Which far block comes i-th: the last one, then backwards.

    Masked ones come first: where queries see no keys before LOW, block 0 is the second.
    """
    n = blocks - 1 - i
    if LOW > 0:
        n = gl.where(i == 0, n, gl.where(i == 1, 0, n + 1))
    return n


@gluon.jit
def fetch_blocks(
    k_tiles, v_tiles, k_bufs, v_bufs, full, free, done, outer, pair, key, begin, blocks, lanes,
    size, value_ptr, table_ptr, stride_table,
    BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    LOW: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Bring blocks of keys, the last one first; the number of stages so far.

    A stage of the ring holds K of one block and V, of ``lanes`` members, of the block before, as
    the halves need them.
    """
    K_BYTES: gl.constexpr = BLOCK * D * 2
    V_BYTES: gl.constexpr = M * K_BYTES
    for i in range(0, blocks + 1):
        stage = (done + i) % STAGES
        n = begin + (blocks - 1 - i) * BLOCK
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
            k_tiles, k_bufs, bar, stage, outer, key,
            block_at(i, blocks, LOW) * BLOCK if PAGE > 0 else n,
            size, table_ptr, stride_table, 0, 1, has_k, BLOCK, D, PAGE,
        )  # fmt: skip
        for member in gl.static_range(M):
            # lanes without a member read any head, unused, but where there is one alone
            place = gl.maximum(gl.load(value_ptr + pair * M + member), 0)
            _fetch_block(
                v_tiles, v_bufs, bar, stage, outer, place,
                block_at(i - 1, blocks, LOW) * BLOCK if PAGE > 0 else n + BLOCK,
                size, table_ptr, stride_table, member, M,
                has_v & ((lanes > 1) | (member == 0)), BLOCK, D, PAGE,
            )  # fmt: skip
    return done + blocks + 1


@gluon.jit
def fetch_queries(
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


@gluon.jit
def fetch(
    q_tiles, k_tiles, v_tiles, q_bufs, k_bufs, v_bufs, item_buf, q_full, q_free, full, free,
    next_ptr, work_ptr, start_ptr, length_ptr, table_ptr, ids_ptr, query_ptr, key_ptr, value_ptr,
    items, pairs, tiles, group, head_tiles, queries, size, batch, stride_table, stride_t,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, RAGGED: gl.constexpr, PAGE: gl.constexpr, HAS_IDS: gl.constexpr,
    HAS_LENGTH: gl.constexpr,
):  # fmt: skip
    """Take items from the list and bring their Q, K and V to shared memory."""
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
        tell(item_buf, (1, row, pair, first, begin, count, keys))
        mbarrier.expect(q_full, 2 * q_tiles.block_type.nbytes)
        for half in gl.static_range(2):
            _fetch_tile(
                q_tiles, [outer, head, begin + first + half * ROWS, 0], q_full, q_bufs.index(half)
            )
        if PAGE > 0:
            outer = row
            begin = 0
        blocks = blocks_of(first, count, keys, 2 * ROWS, BLOCK)
        done = fetch_blocks(
            k_tiles, v_tiles, k_bufs, v_bufs, full, free, done, outer, pair, key, begin, blocks, M,
            keys, value_ptr, table_ptr, stride_table, BLOCK, D, M, STAGES, 0, PAGE,
        )  # fmt: skip
        turn += 1
        item = gl.atomic_add(next_ptr, 1)
    finish(item_buf, q_full, q_free, turn)
