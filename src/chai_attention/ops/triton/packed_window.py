"""Prefill of packed sequences with an exact window, in one launch for all of them.

A tile of queries attends to the far keys with the scores of a cluster's representative, for several
members at once, as in `prefill`. The same online softmax then goes on for every member with its own
Q and K: over the sinks, and over the band of its last keys. Streaming heads have no far part.
"""

from __future__ import annotations

import logging

import triton
import triton.language as tl
from torch import Tensor

from chai_attention.ops.call import AttentionCall, PackedKV, PackedQueries, PagedKV
from chai_attention.ops.triton.checks import page_strides
from chai_attention.ops.triton.context_parts import (
    _keep_part,
    _lse_base2,
    _part_of,
    count_of,
    join,
    memory_of,
)
from chai_attention.ops.triton.decode import LOG2_E, _membership_of, padded
from chai_attention.ops.triton.head_tiles import HeadTiles
from chai_attention.ops.triton.launch_prefill import precision_of, rows_of, tile_of
from chai_attention.ops.triton.prefill import _go_on, _in_groups, _sequence_of, _tile
from chai_attention.ops.triton.repeated import aligned, dtypes
from chai_attention.ops.triton.sizes import power_of_2

logger = logging.getLogger("chai_attention")

BLOCK_LOCAL = 32  # keys of a step among the local ones


@triton.jit
def _home(
    head, place_ptr, membership_id, kept, far_ptr, local_ptr, table_ptr, local_table_ptr, begin,
    stride_page, stride_head, stride_token, local_page_stride, local_head_stride,
    local_token_stride,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, PAGE: tl.constexpr, LOCAL_PAGE: tl.constexpr,
):  # fmt: skip
    """Where a query head's own K, or V, is: its start, its page table, page size and strides."""
    group = head // GROUP
    if PAGE == 0:
        base = far_ptr + group * stride_head + begin * stride_token
        table, page, across, along = table_ptr, 1, stride_page, stride_token
    else:
        place = tl.load(place_ptr + membership_id * GROUPS + group).to(tl.int64)
        away = place >= kept
        base = tl.where(
            away, local_ptr + (place - kept) * local_head_stride, far_ptr + place * stride_head
        )
        table = tl.where(away, local_table_ptr, table_ptr)
        page = tl.where(away, LOCAL_PAGE, PAGE)
        across = tl.where(away, local_page_stride, stride_page)
        along = tl.where(away, local_token_stride, stride_token)
    return base, table, page, across, along


@triton.jit
def _tokens(n, there, table, page, across, along, PAGE: tl.constexpr):
    """Where tokens ``n`` stand behind a home's start; looked up only for those ``there``."""
    if PAGE == 0:
        return n.to(tl.int64) * along
    number = tl.load(table + n // page, mask=there, other=0).to(tl.int64)
    return number * across + (n % page).to(tl.int64) * along


@triton.jit(
    do_not_specialize=[
        "head_tiles", "batch", "recent", "kept_keys", "kept_values", "parts", "total",
        "stride_table", "stride_local", "stride_offset",
    ],
    do_not_specialize_on_alignment=[
        "length_ptr", "start_ptr", "table_ptr", "local_table_ptr", "ids_ptr", "offset_ptr",
    ],
)  # fmt: skip
def _prefill_window(
    q_ptr, k_ptr, v_ptr, local_k_ptr, local_v_ptr, length_ptr, start_ptr, table_ptr,
    local_table_ptr, ids_ptr, slot_ptr, query_ptr, key_ptr, head_ptr, value_ptr, key_place_ptr,
    value_place_ptr, offset_ptr, out_ptr, lse_ptr,
    scale, softcap, head_tiles, batch, recent, kept_keys, kept_values, parts, total,
    stride_qk, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    local_kb, local_kh, local_ks, local_vb, local_vh, local_vs,
    stride_table, stride_local, stride_t, stride_offset, stride_os, stride_oh,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LOCAL: tl.constexpr, PAGE: tl.constexpr, LOCAL_PAGE: tl.constexpr, SINKS: tl.constexpr,
    SINKS_P: tl.constexpr, HAS_IDS: tl.constexpr, HAS_OFFSET: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head tile of up to two members, ROWS queries. PAGE is 0 where no keys are in pages.

    SPLIT: one of the parts of the far keys (`context_parts`), or one member's local keys. Steps
    along local keys are short and wait for each other, so these programs come first.
    """
    item = tl.program_id(0)
    at_part = 0
    if SPLIT:
        each = tl.num_programs(0) // (M + parts)
        at_part = item // each - M
        item %= each
    row, first_tile = _sequence_of(item // head_tiles, start_ptr, batch, ROWS)
    item -= first_tile * head_tiles
    begin = tl.load(start_ptr + row)
    queries = tl.load(start_ptr + row + 1) - begin
    tiles = tl.cdiv(queries, ROWS)
    if item >= tiles * head_tiles:
        return
    tile, head_tile = _in_groups(item, tiles, tl.maximum(2, 128 // tiles), head_tiles)
    row = tl.cast(row, tl.int64)
    membership_id = _membership_of(row, ids_ptr, stride_t, HAS_IDS)
    lane = (membership_id * head_tiles + head_tile) * M
    if tl.load(head_ptr + lane) < 0:
        return
    length = queries
    if PAGE > 0:
        length = tl.load(length_ptr + row).to(tl.int32)
        table = table_ptr + row * stride_table
        local_table = local_table_ptr + row * stride_local
    else:
        table = start_ptr  # functions take no None
        local_table = start_ptr
    begin = tl.cast(begin, tl.int64)
    i = tile * ROWS + tl.arange(0, ROWS)
    token = begin + i.to(tl.int64)
    past = length - queries
    position = past + i
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    q_base = q_ptr + token[:, None] * stride_qs + d[None, :]
    q_mask = (i[:, None] < queries) & (d[None, :] < D)

    # ---- far keys: scores and softmax once for all members
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, M * DVP], dtype=tl.float32)
    column = tl.arange(0, M * DVP)
    stop = past + tl.minimum(queries, (tile + 1) * ROWS) - recent
    has_far = (tl.load(slot_ptr + membership_id * head_tiles + head_tile) >= 0) & (stop > SINKS)
    if has_far & (at_part >= 0):
        query = tl.load(query_ptr + membership_id * head_tiles + head_tile).to(tl.int64)
        key = tl.load(key_ptr + membership_id * head_tiles + head_tile).to(tl.int64)
        place = tl.load(value_ptr + lane + column // DVP).to(tl.int64)
        in_value = (place >= 0) & (column % DVP < DV)
        q = tl.load(q_base + query * stride_qk, mask=q_mask, other=0.0)
        k_base = k_ptr + key * stride_kh + d
        v_base = v_ptr + place * stride_vh + column % DVP
        if PAGE == 0:
            k_base += begin * stride_ks
            v_base += begin * stride_vs
        reach = position - recent
        # blocks that every query of the tile sees whole need no mask, but the one with the sinks
        whole = tl.maximum(past + tile * ROWS + 1 - recent, 0) // BLOCK * BLOCK
        lead = 0
        if SINKS > 0:
            lead = tl.cdiv(tl.minimum(SINKS, whole), BLOCK)
        begin_part, end_part = lead * BLOCK, whole
        if SPLIT:
            begin_part, end_part = _part_of(begin_part, whole, at_part, parts, BLOCK)
            lead = tl.where(at_part == 0, lead, 0)
            stop = tl.where(at_part == parts - 1, stop, whole)
        for first in range(begin_part, end_part, BLOCK):
            best, weight, acc = _tile(
                q, k_base, v_base, k_ptr, table, first, 0, stop, reach, best, weight, acc, d,
                in_value, k_ptr, v_ptr, 0, 0, 0, 0,
                scale, softcap, stride_kb, stride_ks, stride_vb, stride_vs,
                D, DP, M * DVP, BLOCK, PAGE, False, False, False, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
        for n in range(0, lead + tl.cdiv(stop - whole, BLOCK)):
            first = tl.where(n < lead, n * BLOCK, whole + (n - lead) * BLOCK)
            best, weight, acc = _tile(
                q, k_base, v_base, k_ptr, table, first, SINKS, stop, reach, best, weight, acc, d,
                in_value, k_ptr, v_ptr, 0, 0, 0, 0,
                scale, softcap, stride_kb, stride_ks, stride_vb, stride_vs,
                D, DP, M * DVP, BLOCK, PAGE, True, False, False, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip

    if SPLIT:
        kept_at = tl.cast(tl.where(at_part < 0, parts, at_part), tl.int64)
        out_ptr += kept_at * total * stride_os
        lse_ptr += kept_at * total * (stride_os // DV)
        own_offset = out_ptr  # functions take no None
        if HAS_OFFSET:
            own_offset = offset_ptr + row * stride_offset
        if at_part >= 0:
            _keep_part(
                acc, best, weight, head_ptr + lane, own_offset, out_ptr, lse_ptr, token,
                i < queries, stride_os, stride_oh, DV, DVP, M, HAS_OFFSET,
            )  # fmt: skip
            return

    # ---- local keys, member by member
    if M == 2:
        part, other = tl.split(tl.permute(tl.reshape(acc, [ROWS, 2, DVP]), [0, 2, 1]))
    else:
        part = acc
        other = acc
    lanes = 1
    for member in tl.static_range(1, M):
        lanes += (tl.load(head_ptr + lane + member) >= 0).to(tl.int32)
    member_begin = 0
    if SPLIT:
        member_begin = at_part + M
        lanes = tl.minimum(lanes, member_begin + 1)
    stop = tl.minimum(length, past + (tile + 1) * ROWS)
    for member in range(member_begin, lanes):
        head = tl.load(head_ptr + lane + member).to(tl.int64)
        q = tl.load(q_base + head * stride_qk, mask=q_mask, other=0.0)
        k_base, k_table, k_page, k_across, k_along = _home(
            head, key_place_ptr, membership_id, kept_keys, k_ptr, local_k_ptr, table, local_table,
            begin, stride_kb, stride_kh, stride_ks, local_kb, local_kh, local_ks,
            GROUP, GROUPS, PAGE, LOCAL_PAGE,
        )  # fmt: skip
        v_base, v_table, v_page, v_across, v_along = _home(
            head, value_place_ptr, membership_id, kept_values, v_ptr, local_v_ptr, table,
            local_table, begin, stride_vb, stride_vh, stride_vs, local_vb, local_vh, local_vs,
            GROUP, GROUPS, PAGE, LOCAL_PAGE,
        )  # fmt: skip
        top = best
        share = weight
        if HAS_OFFSET:
            top += tl.load(offset_ptr + row * stride_offset + head) * LOG2_E
            share = tl.where(top > float("-inf"), share, 0.0)
        if SINKS > 0:
            sink = tl.arange(0, SINKS_P)
            has = sink < tl.minimum(SINKS, stop)
            sees = has[None, :] & (sink[None, :] <= position[:, None])
            top, share, part = _go_on(
                q, k_base, v_base, _tokens(sink, has, k_table, k_page, k_across, k_along, PAGE),
                _tokens(sink, has, v_table, v_page, v_across, v_along, PAGE), has, sees,
                top, share, part, d, dv, scale, softcap, D, DV, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
        for first in range(tl.maximum(past + tile * ROWS - recent + 1, SINKS), stop, LOCAL):
            n = first + tl.arange(0, LOCAL)
            there = n < stop
            seen = (n[None, :] <= position[:, None]) & (n[None, :] > position[:, None] - recent)
            top, share, part = _go_on(
                q, k_base, v_base, _tokens(n, there, k_table, k_page, k_across, k_along, PAGE),
                _tokens(n, there, v_table, v_page, v_across, v_along, PAGE), there,
                seen & there[None, :],
                top, share, part, d, dv, scale, softcap, D, DV, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
        some = share > 0
        result = tl.where(some[:, None], part / tl.where(some, share, 1.0)[:, None], 0.0)
        tl.store(
            out_ptr + token[:, None] * stride_os + head * stride_oh + dv[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=(i[:, None] < queries) & (dv[None, :] < DV),
        )
        if SPLIT:
            lse = _lse_base2(top, share)
            tl.store(lse_ptr + token * (stride_os // DV) + head, lse, mask=i < queries)
        part = other


def prefill_packed_window(
    queries: PackedQueries,
    kv: PagedKV | PackedKV,
    call: AttentionCall,
    head_tiles: HeadTiles,
    out: Tensor,
) -> None:
    """Write ``out [T, H, Dv]``, of any strides but the last.

    Args:
        queries: of all heads.
        kv: far and local pages; or K and V in natural order.
        call: how.
        head_tiles: the work, of up to two members each.
        out: written to.
    """
    query, key, value, softcap = queries.query, kv.key, kv.value, call.softcap
    (total, heads, dim), value_dim = query.shape, value.shape[-1]
    member, ids, offset = call.membership, call.membership_ids, call.offset
    batch, groups = queries.query_start_loc.shape[0] - 1, member.kv_heads
    tile = tile_of(query, value, head_tiles.members, rows_of(queries))
    lengths = table = local_table = None
    logger.debug(
        "packed prefill kernel with a window%s: %d members a program, tiles of %d queries",
        ", paged" if isinstance(kv, PagedKV) else "",
        head_tiles.members,
        tile.rows,
    )
    if isinstance(kv, PagedKV):
        local = kv.window
        assert local is not None
        lengths, table, local_table = kv.seq_lens, kv.block_table, local.block_table
        states = (key, value, local.key, local.value)
        page, local_page, recent, sinks = key.shape[1], local.page, local.recent, local.sinks
        strides, are_aligned = kv.once(_layout)
        places = member.key_place, member.value_place
    else:
        states = (key, value, key, value)
        page, local_page, recent, sinks = 0, 0, kv.recent, kv.sinks
        strides = 0, key.stride(1), key.stride(0), 0, value.stride(1), value.stride(0), *(0,) * 6
        are_aligned, places = aligned(key, value), (key, key)
    count = total // tile.rows + batch  # enough for any lengths of sequences
    starts, parts = queries.query_start_loc, count_of(queries, kv, member, head_tiles, tile.rows)
    programs, (target, lse) = count * head_tiles.count, (out, None)
    if parts > 1:  # and each member's local keys, whose results have one place more
        programs *= parts + head_tiles.members
        target, lse = memory_of(parts + 1, out, queries.shared)
    q_strides, out_strides = query.stride()[1::-1], target.stride()[-3:-1]
    key_of_launch = (
        prefill_packed_window, tile, dim, value_dim, page, local_page, sinks, softcap is None,
        q_strides, strides, out_strides,
        *dtypes(query, key, target, lse, lengths, starts, table, local_table, ids, offset),
    )  # fmt: skip
    launch = head_tiles.launches.get(key_of_launch) or head_tiles.launches.keep(
        key_of_launch, _prefill_window, D=dim, DP=padded(dim), DV=value_dim, DVP=padded(value_dim),
        M=head_tiles.members, GROUP=heads // groups, GROUPS=groups, ROWS=tile.rows,
        BLOCK=tile.block, LOCAL=BLOCK_LOCAL, PAGE=page, LOCAL_PAGE=local_page, SINKS=sinks,
        SINKS_P=max(16, power_of_2(sinks)), HAS_IDS=ids is not None,
        HAS_OFFSET=offset is not None, HAS_SOFTCAP=softcap is not None, SPLIT=parts > 1,
        PRECISION=precision_of(query), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    launch(
        (programs, 1, 1), are_aligned and aligned(query, target),
        query, *states, lengths, starts, table, local_table, ids,
        *head_tiles.tables, *places, offset, target, lse,
        float(call.scale), float(softcap or 1.0), head_tiles.count, batch, recent,
        member.kept_keys, member.kept_values, parts, total, *q_strides, *strides,
        0 if table is None else table.stride(0),
        0 if local_table is None else local_table.stride(0),
        head_tiles.stride, 0 if offset is None else offset.stride(0), *out_strides,
    )  # fmt: skip
    if lse is not None:
        join(target, lse, starts, head_tiles, out)


def _layout(kv: PagedKV) -> tuple[tuple[int, ...], bool]:
    """Strides of page, head and token of far and local K and V; whether all are `aligned`."""
    assert kv.window is not None
    states = (kv.key, kv.value, kv.window.key, kv.window.value)
    return tuple(n for pages in states for n in page_strides(pages)), aligned(*states)
