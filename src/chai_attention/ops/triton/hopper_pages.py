"""What the Hopper kernel over pages with an exact window fetches: far keys, then local ones.

Local K and V of a head stand in far pages where the cache keeps them, else in local pages. They
come in boxes of 16 tokens, into which all pages can be cut.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from chai_attention.ops.triton.hopper_fetch import (
    _fetch_tile,
    fetch_blocks,
    fetch_queries,
    finish,
    tell,
)
from chai_attention.ops.triton.hopper_local import BOX
from chai_attention.ops.triton.hopper_work import packed_work

COLUMNS = gl.constexpr(64)  # of a head: as wide as the swizzle
# of an item: is there one, first query, far blocks, members, first token, queries, keys, first
# local key, local blocks, members' heads and offsets; the place of the representative's Q, twice
FIELDS = gl.constexpr(15)


@gluon.jit
def band_of(past, first, queries, recent, TILE: gl.constexpr, BLOCK: gl.constexpr):
    """Where the keys begin that a tile's queries see local, in whole boxes, and how many blocks."""
    begin = gl.maximum(past + first - recent + 1, 0) // BOX * BOX
    stop = past + gl.minimum(queries, first + TILE)
    return begin, gl.maximum(stop - begin + BLOCK - 1, 0) // BLOCK


@gluon.jit
def _pages(table, at, last, page):
    """Pages of the four boxes of a block; those behind the last key come from its page, unused."""
    return (
        gl.load(table + gl.minimum(at, last) // page),
        gl.load(table + gl.minimum(at + BOX, last) // page),
        gl.load(table + gl.minimum(at + 2 * BOX, last) // page),
        gl.load(table + gl.minimum(at + 3 * BOX, last) // page),
    )


@gluon.jit
def _fetch_box(
    far, local, away, head, outer, at, bar, bufs, stage, box: gl.constexpr,
    D: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """Bring one box of a head's K or V to its place in the first of a stage's ``EACH`` parts."""
    for c in gl.static_range(D // COLUMNS):
        place = (stage * EACH * (D // COLUMNS) + c) * 4 + box
        where = [outer, head, at, c * COLUMNS]
        _fetch_tile(far, where, bar, bufs.index(place), pred=away == 0)
        _fetch_tile(local, where, bar, bufs.index(place), pred=away != 0)


@gluon.jit
def _fetch_local(
    far_k, far_v, local_k, local_v, k_parts, v_parts, full, free, done, key_place, value_place,
    kept_keys, kept_values, table, local_table, begin, blocks, size,
    BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    SINKS: gl.constexpr, PAGE: gl.constexpr, LOCAL_PAGE: gl.constexpr,
):  # fmt: skip
    """Bring the blocks that `hopper_band.attend_band` takes: the sinks', then the band's."""
    BYTES: gl.constexpr = 2 * BLOCK * D * 2
    k_away = (key_place >= kept_keys).to(gl.int32)
    v_away = (value_place >= kept_values).to(gl.int32)
    k_head = key_place - k_away * kept_keys
    v_head = value_place - v_away * kept_values
    k_page = gl.where(k_away != 0, LOCAL_PAGE, PAGE)
    v_page = gl.where(v_away != 0, LOCAL_PAGE, PAGE)
    k_table = gl.where(k_away != 0, local_table, table)
    v_table = gl.where(v_away != 0, local_table, table)
    last = gl.maximum(size - 1, 0)
    for n in range(0, blocks + (1 if SINKS > 0 else 0)):
        at = begin + n * BLOCK
        final = last
        if SINKS > 0:
            at = gl.where(n == 0, 0, at - BLOCK)
            final = gl.where(n == 0, gl.minimum(last, SINKS - 1), last)
        # all places are looked up before the first is needed
        k_pages = _pages(k_table, at, final, k_page)
        v_pages = _pages(v_table, at, final, v_page)
        stage = done % STAGES
        bar = full.index(stage)
        mbarrier.wait(free.index(stage), ((done // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        for box in gl.static_range(4):
            token = at + box * BOX
            _fetch_box(far_k, local_k, k_away, k_head, k_pages[box], token % k_page, bar, k_parts,
                       stage, box, D, 1)  # fmt: skip
            _fetch_box(far_v, local_v, v_away, v_head, v_pages[box], token % v_page, bar, v_parts,
                       stage, box, D, M)  # fmt: skip
        done += 1
    return done


@gluon.jit
def fetch_pages(
    q_tiles, k_tiles, v_tiles, box_k_tiles, box_v_tiles, local_k_tiles, local_v_tiles,
    q_bufs, k_bufs, v_bufs, k_local, v_local,
    item_buf, item_full, item_free, q_full, q_free, full, free,
    next_ptr, work_ptr, start_ptr, length_ptr, table_ptr, local_table_ptr, ids_ptr,
    slot_ptr, query_ptr, key_ptr, head_ptr, value_ptr, key_place_ptr, value_place_ptr, offset_ptr,
    items, streaming, head_tiles, recent, kept_keys, kept_values, batch, stride_t, stride_table,
    stride_local, stride_offset,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, SINKS: gl.constexpr, SHARED: gl.constexpr, GROUPS: gl.constexpr,
    PAGE: gl.constexpr, LOCAL_PAGE: gl.constexpr, HAS_IDS: gl.constexpr,
    HAS_OFFSET: gl.constexpr,
):  # fmt: skip
    """Take items from the list and bring their Q, K and V to shared memory."""
    done = 0
    asked = 0
    turn = 0
    row = 0
    item = gl.atomic_add(next_ptr, 1)
    while item < items:
        row, pair, first, begin, queries, length = packed_work(
            item, row, work_ptr, start_ptr, length_ptr, ids_ptr, head_tiles, batch, stride_t,
            HAS_IDS, True, 2 * ROWS, streaming,
        )  # fmt: skip
        size = length - recent
        stop = gl.minimum(size, size - queries + first + 2 * ROWS)
        blocks = gl.where(stop > SINKS, (stop + BLOCK - 1) // BLOCK, 0)
        blocks = gl.where(gl.load(slot_ptr + pair) < 0, 0, blocks)
        local, local_blocks = band_of(length - queries, first, queries, recent, 2 * ROWS, BLOCK)
        head = gl.load(head_ptr + pair * M)
        next_head = gl.load(head_ptr + pair * M + M - 1)
        lanes = 1
        if M > 1:
            lanes += (next_head >= 0).to(gl.int32)
        offset = 0
        next_offset = 0
        if HAS_OFFSET:
            offsets = offset_ptr + row * stride_offset
            offset = gl.load(offsets + head).to(gl.int32, bitcast=True)
            next_offset = gl.load(offsets + gl.maximum(next_head, 0)).to(gl.int32, bitcast=True)
        mbarrier.wait(item_free, (turn & 1) ^ 1)
        tell(item_buf, (
            1, first, blocks, lanes, begin, queries, length, local, local_blocks, head, next_head,
            offset, next_offset, asked % 2, asked % 2,
        ))  # fmt: skip
        mbarrier.arrive(item_full, count=1)
        turn += 1
        if blocks > 0:
            fetch_queries(
                q_tiles, q_bufs, q_full, q_free, asked, 0, gl.load(query_ptr + pair), begin + first,
                ROWS,
            )  # fmt: skip
            asked += 1
            done = fetch_blocks(
                k_tiles, v_tiles, k_bufs, v_bufs, full, free, done, row, pair,
                gl.load(key_ptr + pair), 0, blocks, lanes, length, value_ptr, table_ptr,
                stride_table, BLOCK, D, M, STAGES, SINKS, PAGE,
            )  # fmt: skip
        for _ in range(0, lanes):
            fetch_queries(q_tiles, q_bufs, q_full, q_free, asked, 0, head, begin + first, ROWS)
            asked += 1
            place = pair // head_tiles * GROUPS + head // SHARED
            done = _fetch_local(
                box_k_tiles, box_v_tiles, local_k_tiles, local_v_tiles, k_local, v_local, full,
                free, done, gl.load(key_place_ptr + place).to(gl.int32),
                gl.load(value_place_ptr + place).to(gl.int32), kept_keys, kept_values,
                table_ptr + row.to(gl.int64) * stride_table,
                local_table_ptr + row.to(gl.int64) * stride_local, local, local_blocks, length,
                BLOCK, D, M, STAGES, SINKS, PAGE, LOCAL_PAGE,
            )  # fmt: skip
            head = next_head
        item = gl.atomic_add(next_ptr, 1)
    finish(item_buf, item_full, item_free, turn)
