"""Prefill: causal attention in tiles; scores and softmax once for several members' V.

One kernel serves whole batches, packed sequences of different lengths, and sequences whose context
stands in pages: what differs is where a sequence's tokens are. `launch_prefill` launches it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chai_attention.ops.triton.context_parts import _keep_part, _part_of
from chai_attention.ops.triton.decode import LOG2_E, _membership_of, _scores_base2

SEQUENCES = tl.constexpr(128)  # whose starts are read at a time; there may be more


@triton.jit
def _tile(
    q, k_base, v_base, valid_base, table_base, first, low, stop, position, best, weight, acc, d,
    in_value, k_tiles, v_tiles, tile_row, tile_begin, key, v_column,
    scale, softcap, stride_kb, stride_ks, stride_vb, stride_vs,
    D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PAGE: tl.constexpr, MASKED: tl.constexpr, TILES: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: scores, running softmax, and the product with the members' V.

    MASKED: queries see keys from ``low`` on, up to their position and before ``stop``.
    """
    n = first + tl.arange(0, BLOCK)
    inside = (n >= low) & (n < stop)
    if PAGE == 0:
        k_at = n.to(tl.int64) * stride_ks
        v_at = n.to(tl.int64) * stride_vs
    else:
        if PAGE % BLOCK == 0:  # a block lies in one page
            page = tl.load(table_base + first // PAGE).to(tl.int64)
        elif MASKED:
            page = tl.load(table_base + n // PAGE, mask=inside, other=0).to(tl.int64)
        else:
            page = tl.load(table_base + n // PAGE).to(tl.int64)
        within = (n % PAGE).to(tl.int64)
        k_at = page * stride_kb + within * stride_ks
        v_at = page * stride_vb + within * stride_vs
    if MASKED:
        k = tl.load(
            k_base[:, None] + k_at[None, :], mask=inside[None, :] & (d[:, None] < D), other=0.0
        )
        v = tl.load(
            v_base[None, :] + v_at[:, None], mask=inside[:, None] & in_value[None, :], other=0.0
        )
    elif TILES:
        k = k_tiles.load([tile_row, key, tile_begin + first, 0]).reshape(BLOCK, D).T
        v = v_tiles.load([tile_row, tile_begin + first, v_column]).reshape(BLOCK, WIDTH)
    else:
        if D == DP:
            k = tl.load(k_base[:, None] + k_at[None, :])
        else:
            k = tl.load(k_base[:, None] + k_at[None, :], mask=d[:, None] < D, other=0.0)
        v = tl.load(v_base[None, :] + v_at[:, None], mask=in_value[None, :], other=0.0)
    k, v = k.to(q.dtype), v.to(q.dtype)  # pages may be of fewer bits
    s = tl.dot(q, k, input_precision=PRECISION) * scale
    s = _scores_base2(s, softcap, HAS_SOFTCAP)
    if MASKED:
        s = tl.where((n[None, :] <= position[:, None]) & inside[None, :], s, float("-inf"))
    if HAS_VALID:
        real = tl.load(valid_base + n, mask=inside, other=0) != 0
        s = tl.where(real[None, :], s, float("-inf"))
    new = tl.maximum(best, tl.max(s, axis=1))
    base = new
    if MASKED or HAS_VALID:
        base = tl.where(new == float("-inf"), 0.0, new)  # a row may have seen nothing yet
    p = tl.exp2(s - base[:, None])
    old = tl.exp2(best - base)
    weight = weight * old + tl.sum(p, axis=1)
    acc = acc * old[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return new, weight, acc


@triton.jit
def _go_on(
    q, k_base, v_base, k_at, v_at, there, seen, best, weight, acc, d, dv, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on over some keys: those ``there`` are read, and each query sees those ``seen``."""
    k = tl.load(
        k_base + k_at[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0
    ).to(q.dtype)  # fmt: skip
    v = tl.load(
        v_base + v_at[:, None] + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0
    ).to(q.dtype)  # fmt: skip
    s = _scores_base2(tl.dot(q, k, input_precision=PRECISION) * scale, softcap, HAS_SOFTCAP)
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(best, tl.max(s, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: weight 0, not NaN
    p = tl.exp2(s - base[:, None])
    old = tl.exp2(best - base)
    acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
    return new, weight * old + tl.sum(p, axis=1), acc


@triton.jit
def _sequence_of(item, start_ptr, batch, ROWS: tl.constexpr):
    """The sequence that a tile of packed tokens belongs to, and that sequence's first tile.

    Tiles are counted from sequence to sequence without reading the lengths on the host: sequence
    r gets those from ``start // ROWS + r`` on, which is enough for it, with at most one to spare.
    """
    row, first_tile = -1, 0
    for first in range(0, batch, SEQUENCES):
        r = first + tl.arange(0, SEQUENCES)
        key = tl.load(start_ptr + r, mask=r < batch, other=0) // ROWS + r
        mine = (r < batch) & (key <= item)
        row += tl.sum(mine.to(tl.int32), axis=0)
        first_tile = tl.maximum(first_tile, tl.max(tl.where(mine, key, 0), axis=0))
    return row, first_tile


@triton.jit
def _in_groups(item, tiles, group, pairs):
    """The tile of an item, and which of the ``pairs`` of a sequence and a head tile it is of.

    Groups of head tiles come one after the other, so that tiles at work share K and V in the L2
    cache; within a group the last queries, which see the most keys, start first.
    """
    start = item // (group * tiles) * group
    width = tl.minimum(group, pairs - start)
    inside = item - start * tiles
    return tiles - 1 - inside // width, start + inside % width


@triton.jit(
    do_not_specialize=[
        "queries", "size", "head_tiles", "tiles", "group", "pairs", "batch", "limit", "parts",
        "total", "stride_table",
    ],
    do_not_specialize_on_alignment=["length_ptr", "start_ptr", "table_ptr", "ids_ptr"],
)  # fmt: skip
def _prefill(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, length_ptr, valid_ptr, start_ptr, table_ptr, ids_ptr,
    slot_ptr, query_ptr, key_ptr, head_ptr, value_ptr, out_ptr, lse_ptr,
    scale, softcap, queries, size, head_tiles, tiles, group, pairs, batch, limit, parts, total,
    stride_qb, stride_qk, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_mb, stride_table, stride_t,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lk, stride_lq,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    RAGGED: tl.constexpr, LIMITED: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_LENGTH: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head tile of members, ROWS queries.

    RAGGED: the queries of all sequences are packed, as are K and V unless they are in pages.
    LIMITED: only sequences without context, and of those the first ``limit`` tokens.
    SPLIT: one of the parts of the keys (`context_parts`), of packed queries.
    """
    item = tl.program_id(0)
    at_part = 0
    if SPLIT:
        at_part = item % parts
        item //= parts
    row, begin = 0, 0
    if RAGGED and not LIMITED:
        # one sequence after the other, each with a grid of its own
        row, first_tile = _sequence_of(item // head_tiles, start_ptr, batch, ROWS)
        item -= first_tile * head_tiles
        begin = tl.load(start_ptr + row)
        queries = tl.load(start_ptr + row + 1) - begin
        tiles = tl.cdiv(queries, ROWS)
        if item >= tiles * head_tiles:
            return
        group, pairs = tl.maximum(2, 128 // tiles), head_tiles
    tile, pair = _in_groups(item, tiles, group, pairs)
    head_tile = pair % head_tiles
    if LIMITED or not RAGGED:
        row = pair // head_tiles
    if LIMITED:
        begin = tl.load(start_ptr + row)
        queries = tl.load(start_ptr + row + 1) - begin
    row = tl.cast(row, tl.int64)
    membership_id = _membership_of(row, ids_ptr, stride_t, HAS_IDS)
    slot = tl.load(slot_ptr + membership_id * head_tiles + head_tile)
    if slot < 0:
        return
    if HAS_LENGTH:
        length = tl.load(length_ptr + row).to(tl.int32)
    elif RAGGED:
        length = queries
    else:
        length = size
    if LIMITED:
        queries = tl.where(length == queries, tl.minimum(queries, limit), 0)
        length = queries
        if tile * ROWS >= queries:
            return
    i = tile * ROWS + tl.arange(0, ROWS)
    position = length - queries + i
    d = tl.arange(0, DP)
    column = tl.arange(0, M * DVP)
    lane, dv = column // DVP, column % DVP
    query = tl.load(query_ptr + membership_id * head_tiles + head_tile).to(tl.int64)
    key = tl.load(key_ptr + membership_id * head_tiles + head_tile).to(tl.int64)
    place = tl.load(value_ptr + (membership_id * head_tiles + head_tile) * M + lane).to(tl.int64)
    head = tl.load(head_ptr + (membership_id * head_tiles + head_tile) * M + lane)
    in_value = (place >= 0) & (dv < DV)
    token = begin + i.to(tl.int64)
    q = tl.load(
        q_ptr + row * stride_qb + query * stride_qk + token[:, None] * stride_qs + d[None, :],
        mask=(i[:, None] < queries) & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    k_base = k_ptr + key * stride_kh + d
    v_base = v_ptr + place * stride_vh + dv
    table_base = k_ptr
    tile_row = 0
    if PAGE > 0:
        table_base = table_ptr + row * stride_table
    elif RAGGED:
        k_base += tl.cast(begin, tl.int64) * stride_ks
        v_base += tl.cast(begin, tl.int64) * stride_vs
    else:
        k_base += row * stride_kb
        v_base += row * stride_vb
        tile_row = row.to(tl.int32)
    # members of a head tile lie side by side in V; lanes without one read their neighbours, unused
    v_column = tl.load(value_ptr + (membership_id * head_tiles + head_tile) * M) * DV
    valid_base = valid_ptr + row * stride_mb if HAS_VALID else k_ptr

    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, M * DVP], dtype=tl.float32)
    stop = tl.minimum(length, length - queries + (tile + 1) * ROWS)
    # blocks that every query of the tile sees whole need no mask
    whole = tl.maximum(length - queries + tile * ROWS + 1, 0) // BLOCK * BLOCK
    begin_part, end_part = 0, whole
    if SPLIT:
        begin_part, end_part = _part_of(0, whole, at_part, parts, BLOCK)
        stop = tl.where(at_part == parts - 1, stop, whole)
    for first in range(begin_part, end_part, BLOCK):
        best, weight, acc = _tile(
            q, k_base, v_base, valid_base, table_base, first, 0, stop, position, best, weight, acc,
            d, in_value, k_tiles, v_tiles, tile_row, begin, key.to(tl.int32), v_column,
            scale, softcap, stride_kb, stride_ks, stride_vb, stride_vs,
            D, DP, M * DVP, BLOCK, PAGE, False, TILES, HAS_VALID, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    for first in range(whole, stop, BLOCK):
        best, weight, acc = _tile(
            q, k_base, v_base, valid_base, table_base, first, 0, stop, position, best, weight, acc,
            d, in_value, k_tiles, v_tiles, tile_row, begin, key.to(tl.int32), v_column,
            scale, softcap, stride_kb, stride_ks, stride_vb, stride_vs,
            D, DP, M * DVP, BLOCK, PAGE, True, TILES, HAS_VALID, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    if SPLIT:
        out_ptr += tl.cast(at_part, tl.int64) * total * stride_os
        lse_ptr += tl.cast(at_part, tl.int64) * total * (stride_os // DV)
        _keep_part(
            acc, best, weight, head_ptr + (membership_id * head_tiles + head_tile) * M, k_ptr,
            out_ptr, lse_ptr, token, i < queries, stride_os, stride_oh, DV, DVP, M, False,
        )  # fmt: skip
        return
    seen = weight > 0
    acc = tl.where(seen[:, None], acc / tl.where(seen, weight, 1.0)[:, None], 0.0)
    target = out_ptr + row * stride_ob + token[:, None] * stride_os + head[None, :] * stride_oh
    tl.store(
        target + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=(i[:, None] < queries) & in_value[None, :],
    )  # fmt: skip
    if HAS_LSE:
        lse = (best + tl.log2(tl.where(seen, weight, 1.0))) / LOG2_E
        lse = tl.where(seen, lse, float("-inf"))
        lse_base = lse_ptr + row * stride_lb + slot * stride_lk
        tl.store(lse_base + token * stride_lq, lse, mask=i < queries)
