"""Decode: one query per sequence, split over the context, then a merge of the splits.

The same kernels serve contiguous caches and pages, with or without an exact recent window. The
window is the merge's work: while the last splits of the far keys are still computed, it attends
to each head's nearest keys, and joins both by their log-sum-exp.
"""

from __future__ import annotations

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from chai_attention.ops.ring import NearRing
from chai_attention.ops.triton.chunks import Chunks

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores_base2(s, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of log2, softcap applied."""
    if HAS_SOFTCAP:
        # tanh from exp2, which saturates without overflow; near 0, where 1 - e would lose digits,
        # from its series
        x = s / softcap
        e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
        far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        y = x * x
        series = 1 - y * (1 / 3 - y * (2 / 15 - y * (17 / 315 - y * (62 / 2835))))
        s = softcap * tl.where(tl.abs(x) < 0.25, x * series, far)
    return s * LOG2_E


@triton.jit
def _line_of(row, rows_ptr, stride_t, HAS_ROWS: tl.constexpr):
    """Where the tables of a sequence begin; ``stride_t`` is 0 where all share one row."""
    if HAS_ROWS:
        row = tl.load(rows_ptr + row).to(tl.int64)
    return row * stride_t


@triton.jit
def _sink_stop(sink_ptr, row, SINKS: tl.constexpr, SINKS_P: tl.constexpr):
    """The position behind the last sink: every real token before it is one."""
    s = tl.arange(0, SINKS_P)
    return tl.max(tl.load(sink_ptr + row * SINKS + s, mask=s < SINKS, other=-1), axis=0) + 1


@triton.jit(do_not_specialize=["size", "chunks", "splits", "recent"])
def _decode(
    q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr, table_ptr, rows_ptr, sink_ptr,
    query_ptr, key_ptr, value_ptr, acc_ptr, sum_ptr,
    scale, softcap, size, chunks, splits, recent,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_mb, stride_table, stride_t,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr, SINKS_P: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_NEAR: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One chunk of members, one split of the far keys: partial sums, their maximum and weight.

    ``PAGE`` is 0 for contiguous caches. Pages are found by ``table_ptr``, and ``stride_kb`` and
    ``stride_vb`` are then those of a page.
    """
    chunk, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    line = _line_of(row, rows_ptr, stride_t, HAS_ROWS)
    slot = tl.load(query_ptr + line * chunks + chunk)
    if slot < 0:
        return
    length = tl.load(length_ptr + row).to(tl.int32) if HAS_LENGTH else size
    begin = 0
    if HAS_NEAR:
        length -= recent
        if SINKS > 0:
            begin = _sink_stop(sink_ptr, row, SINKS, SINKS_P)
    # whole blocks for every split, so that only the last block of all is cut; with pages the first
    # one too, since a block must lie in one page
    base = begin if PAGE == 0 else begin // BLOCK * BLOCK
    each = tl.cdiv(tl.cdiv(tl.maximum(length - base, 0), BLOCK), splits) * BLOCK
    start = base + split * each
    stop = tl.minimum(start + each, length)

    d = tl.arange(0, DP)
    column = tl.arange(0, M * DVP)
    lane, dv = column // DVP, column % DVP
    key = tl.load(key_ptr + line * chunks + chunk).to(tl.int64)
    place = tl.load(value_ptr + (line * chunks + chunk) * M + lane).to(tl.int64)
    in_value = (place >= 0) & (dv < DV)
    q = tl.load(q_ptr + row * stride_qb + slot * stride_qk + d, mask=d < D, other=0.0)
    q = q.to(tl.float32) * scale
    k_base = k_ptr + key * stride_kh + d
    v_base = v_ptr + place * stride_vh + dv
    if PAGE == 0:
        k_base += row * stride_kb
        v_base += row * stride_vb

    best = float("-inf")
    weight = 0.0
    acc = tl.zeros([M * DVP], dtype=tl.float32)
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES):
        n = first + tl.arange(0, BLOCK)
        seen = n < stop
        if PAGE == 0:
            k_at = n.to(tl.int64) * stride_ks
            v_at = n.to(tl.int64) * stride_vs
        elif PAGE % BLOCK == 0:  # a block lies in one page
            page = tl.load(table_ptr + row * stride_table + first // PAGE).to(tl.int64)
            inside = (n % PAGE).to(tl.int64)
            k_at = page * stride_kb + inside * stride_ks
            v_at = page * stride_vb + inside * stride_vs
        else:
            page = tl.load(table_ptr + row * stride_table + n // PAGE, mask=seen, other=0)
            inside = (n % PAGE).to(tl.int64)
            k_at = page.to(tl.int64) * stride_kb + inside * stride_ks
            v_at = page.to(tl.int64) * stride_vb + inside * stride_vs
        k = tl.load(
            k_base[None, :] + k_at[:, None], mask=seen[:, None] & (d[None, :] < D), other=0.0
        )
        v = tl.load(
            v_base[None, :] + v_at[:, None], mask=seen[:, None] & in_value[None, :], other=0.0
        )
        s = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
        s = _scores_base2(s, softcap, HAS_SOFTCAP)
        if HAS_NEAR and SINKS > 0 and PAGE > 0:
            seen = seen & (n >= begin)
        if HAS_VALID:
            seen = seen & (tl.load(valid_ptr + row * stride_mb + n, mask=seen, other=0) != 0)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(best, tl.max(s, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: weight 0, not NaN
        p = tl.exp2(s - shift)
        old = tl.exp2(best - shift)
        weight = weight * old + tl.sum(p, axis=0)
        acc = acc * old + tl.sum(p[:, None] * v.to(tl.float32), axis=0)
        best = new
    if EARLY:
        gdc_launch_dependents()
    part = (row * chunks + chunk) * splits + split
    tl.store(acc_ptr + part * (M * DVP) + column, acc)
    tl.store(sum_ptr + part * 2, best)
    tl.store(sum_ptr + part * 2 + 1, weight)


@triton.jit
def _token_at(position, row, table_ptr, stride_table, stride_b, stride_s, seen,
              PAGE: tl.constexpr):  # fmt: skip
    """Offsets of tokens in a cache."""
    if PAGE == 0:
        at = row * stride_b + position.to(tl.int64) * stride_s
    else:
        page = tl.load(table_ptr + row * stride_table + position // PAGE, mask=seen, other=0)
        at = page.to(tl.int64) * stride_b + (position % PAGE).to(tl.int64) * stride_s
    return at


@triton.jit
def _near(
    head, place, row, slot_row, line, length,
    q_ptr, k_ptr, v_ptr, valid_ptr, table_ptr, ring_ptr, first_ptr, sink_ptr, key_place_ptr,
    scale, softcap, recent, ring_size, ring_from, kept,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_table, stride_rb, stride_rh, stride_rs, stride_fb, stride_fh, stride_fs,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, NEAR: tl.constexpr,
    SINKS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One head's own attention to the sinks and the last keys: maximum, weight, weighted V."""
    j = tl.arange(0, NEAR)
    is_sink = j < SINKS
    position = length - recent + j - SINKS
    inside = (j >= SINKS) & (position >= 0) & (position < length)
    if SINKS > 0:
        sink = tl.load(sink_ptr + row * SINKS + j, mask=is_sink, other=-1)
        # a sink among the last keys counts once, there
        position = tl.where(is_sink, sink, position)
        inside = inside | (is_sink & (sink >= 0) & (sink < length - recent))
    if HAS_VALID:
        inside = inside & (
            tl.load(valid_ptr + row * stride_mb + position, mask=inside, other=0) != 0
        )
    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)
    in_key = d[None, :] < D
    q = tl.load(q_ptr + row * stride_qb + head * stride_qk + d, mask=d < D, other=0.0)
    q = q.to(tl.float32) * scale
    where = tl.load(key_place_ptr + line * KV_HEADS + head // GROUP).to(tl.int64)
    stored = inside & (where + tl.zeros([NEAR], tl.int64) < kept)
    absent = inside & (where + tl.zeros([NEAR], tl.int64) >= kept)
    # K stands in one of three memories; what is masked out of the other two adds nothing
    at = _token_at(position, row, table_ptr, stride_table, stride_kb, stride_ks, inside, PAGE)
    k = tl.load(
        k_ptr + where * stride_kh + at[:, None] + d[None, :],
        mask=stored[:, None] & in_key, other=0.0,
    ).to(tl.float32)  # fmt: skip
    removed = where - kept
    k += tl.load(
        ring_ptr + slot_row * stride_rb + removed * stride_rh
        + ((position - ring_from) % ring_size).to(tl.int64)[:, None] * stride_rs + d[None, :],
        mask=(absent & (j >= SINKS))[:, None] & in_key, other=0.0,
    ).to(tl.float32)  # fmt: skip
    if SINKS > 0:
        k += tl.load(
            first_ptr + slot_row * stride_fb + removed * stride_fh
            + j.to(tl.int64)[:, None] * stride_fs + d[None, :],
            mask=(absent & is_sink)[:, None] & in_key, other=0.0,
        ).to(tl.float32)  # fmt: skip
    at = _token_at(position, row, table_ptr, stride_table, stride_vb, stride_vs, inside, PAGE)
    v = tl.load(
        v_ptr + place * stride_vh + at[:, None] + dv[None, :],
        mask=inside[:, None] & (dv[None, :] < DV), other=0.0,
    ).to(tl.float32)  # fmt: skip
    s = _scores_base2(tl.sum(k * q[None, :], axis=1), softcap, HAS_SOFTCAP)
    s = tl.where(inside, s, float("-inf"))
    best = tl.max(s, axis=0)
    p = tl.exp2(s - tl.where(best == float("-inf"), 0.0, best))
    return best, tl.sum(p, axis=0), tl.sum(p[:, None] * v, axis=0)


@triton.jit(
    do_not_specialize=[
        "size", "chunks", "splits", "clusters", "recent", "ring_size", "ring_from", "kept",
    ]
)  # fmt: skip
def _merge(
    acc_ptr, sum_ptr, slot_ptr, head_ptr, value_ptr, rows_ptr, out_ptr, lse_ptr,
    q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr, table_ptr,
    ring_ptr, first_ptr, sink_ptr, key_place_ptr, offset_ptr, slots_ptr,
    scale, softcap, size, chunks, splits, clusters, recent, ring_size, ring_from, kept,
    stride_ob, stride_oh, stride_t, stride_offset,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_table, stride_rb, stride_rh, stride_rs, stride_fb, stride_fh, stride_fs,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, NEAR: tl.constexpr,
    SINKS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_LENGTH: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_OFFSET: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_LSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one chunk's member, and its nearest keys, and write its output.

    Without nearest keys (``NEAR`` is 0) the columns of V may be dealt to several programs.
    """
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    lane, part_of = tl.program_id(1) % M, tl.program_id(1) // M
    line = _line_of(row, rows_ptr, stride_t, HAS_ROWS)
    head = tl.load(head_ptr + (line * chunks + chunk) * M + lane)
    if head < 0:
        return
    dv = part_of * COLUMNS + tl.arange(0, COLUMNS)
    if NEAR > 0:
        length = tl.load(length_ptr + row).to(tl.int32) if HAS_LENGTH else size
        slot_row = tl.load(slots_ptr + row).to(tl.int64) if HAS_SLOTS else row
        place = tl.load(value_ptr + (line * chunks + chunk) * M + lane).to(tl.int64)
        near_best, near_weight, near_out = _near(
            head, place, row, slot_row, line, length,
            q_ptr, k_ptr, v_ptr, valid_ptr, table_ptr, ring_ptr, first_ptr, sink_ptr,
            key_place_ptr, scale, softcap, recent, ring_size, ring_from, kept,
            stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh,
            stride_vs, stride_mb, stride_table, stride_rb, stride_rh, stride_rs,
            stride_fb, stride_fh, stride_fs,
            D, DP, DV, DVP, GROUP, KV_HEADS, PAGE, NEAR, SINKS, HAS_VALID, HAS_SOFTCAP,
        )  # fmt: skip
    if EARLY:
        gdc_wait()
    split = tl.arange(0, SPLITS)
    part = (row * chunks + chunk) * splits + split
    there = split < splits
    best = tl.load(sum_ptr + part * 2, mask=there, other=float("-inf"))
    weight = tl.load(sum_ptr + part * 2 + 1, mask=there, other=0.0)
    if HAS_OFFSET:
        best += tl.load(offset_ptr + row * stride_offset + head) * LOG2_E
    top = tl.max(best, axis=0)
    if NEAR > 0:
        top = tl.maximum(top, near_best)
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen at all: zeros, not NaN
    factor = tl.exp2(best - base)
    total = tl.sum(weight * factor, axis=0)
    acc = tl.load(
        acc_ptr + part[:, None] * (M * DVP) + lane * DVP + dv[None, :],
        mask=there[:, None] & (factor[:, None] > 0), other=0.0,
    )  # fmt: skip
    out = tl.sum(acc * factor[:, None], axis=0)
    if NEAR > 0:
        share = tl.exp2(near_best - base)
        total += near_weight * share
        out += near_out * share
    out = tl.where(total > 0, out / tl.where(total > 0, total, 1.0), 0.0)
    target = out_ptr + row * stride_ob + head * stride_oh + dv
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=dv < DV)
    if HAS_LSE and tl.program_id(1) == 0:
        slot = tl.load(slot_ptr + line * chunks + chunk)
        lse = (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2_E
        tl.store(lse_ptr + row * clusters + slot, tl.where(total > 0, lse, float("-inf")))


def padded(dim: int) -> int:
    """Head size a tile is made for: a power of two, and no less than a matrix product takes."""
    return max(16, triton.next_power_of_2(dim))


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunks: Chunks,
    out: Tensor,
    lse: Tensor | None,
    *,
    clusters: int,
    scale: float,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    table: Tensor | None = None,
    rows: Tensor | None = None,
    near: NearRing | None = None,
    slots: Tensor | None = None,
    offset: Tensor | None = None,
    key_place: Tensor | None = None,
    splits: int,
    block: int,
    warps: int,
    stages: int,
    early: bool,
    merge_columns: int | None = None,
) -> None:
    """Write ``out [B, H, Dv]`` for ``query [B, k or H, D]``; see `ops.reference.attention`.

    Args:
        query: of the representatives in slot order, or of all heads in theirs.
        key: ``[B, kept, S, D]``, or pages ``[P, N, kept, D]`` if there is a ``table``.
        value: ``[B, G, S, Dv]``, or pages ``[P, N, G, Dv]``.
        chunks: the work; of one row for all sequences, of B rows, or of any number with ``rows``.
        out: any strides but the last.
        lse: ``[B, k]`` float32 or None; without ``near``.
        clusters: k.
        scale: factor on the scores.
        softcap: as in the reference.
        lengths: ``[B]`` int32 keys of each sequence; None for all S (without a table only).
        valid: ``[B, S]`` bool, False for padding.
        table: ``[B, max_pages]`` int32, the block table.
        rows: ``[B]`` int32, row of the chunks' tables of each sequence.
        near: exact recent window; needs a query of all heads, ``key_place``.
        slots: ``[B]`` int32, row of ``near``'s memories of each sequence; None for its own.
        offset: ``[B, H]`` float32, added to the far keys' log-sum-exp.
        key_place: ``[rows, G]`` int32, `Membership.key_place`.
        splits: parts of the context.
        block: keys of a step.
        warps: of a program.
        stages: loads in flight.
        early: let the merge be launched while the last splits are still computed (Hopper and
            later).
        merge_columns: columns of V of a merging program; None for all.
    """
    batch, _, dim = query.shape
    value_dim = value.shape[3]
    heads = out.shape[1]
    members = chunks.head.shape[2]
    wide = padded(value_dim)
    paged = table is not None
    page = key.shape[1] if paged else 0
    # strides of sequence or page, head, token
    order = (0, 2, 1) if paged else (0, 1, 2)
    key_strides = [key.stride(axis) for axis in order]
    value_strides = [value.stride(axis) for axis in order]
    kept, groups = key.shape[order[1]], value.shape[order[1]]
    size = 0 if paged else key.shape[2]
    every_head = query.shape[1] == heads
    stride_t = 0 if chunks.slot.shape[0] == 1 else 1
    sinks = 0 if near is None else near.sinks.shape[2]
    recent = 0 if near is None else near.recent
    ring_size, ring_from = (1, 0) if near is None else (near.ring.shape[2], near.begin)
    near_strides = [0] * 6
    if near is not None:
        near_strides = [*near.ring.stride()[:3], *near.sinks.stride()[:3]]
    ring, first, sink = (None,) * 3 if near is None else (
        near.ring, near.sinks, near.sink_positions,
    )  # fmt: skip
    parts = (batch, chunks.count, splits)
    acc = torch.empty(*parts, members * wide, dtype=torch.float32, device=query.device)
    sums = torch.empty(*parts, 2, dtype=torch.float32, device=query.device)
    stride_mb = 0 if valid is None else valid.stride(0)
    stride_table = 0 if table is None else table.stride(0)
    shared = {
        "D": dim, "DP": padded(dim), "DV": value_dim, "DVP": wide, "M": members,
        "PAGE": page, "SINKS": sinks, "HAS_ROWS": rows is not None,
        "HAS_LENGTH": lengths is not None, "HAS_VALID": valid is not None,
        "HAS_SOFTCAP": softcap is not None, "EARLY": early,
    }  # fmt: skip
    _decode[(chunks.count, splits, batch)](
        query, key, value, lengths, valid, table, rows, sink,
        chunks.query if every_head else chunks.slot, chunks.key, chunks.value, acc, sums,
        scale, softcap or 1.0, size, chunks.count, splits, recent,
        query.stride(0), query.stride(1), *key_strides, *value_strides,
        stride_mb, stride_table, stride_t,
        BLOCK=block, SINKS_P=triton.next_power_of_2(max(1, sinks)), HAS_NEAR=near is not None,
        STAGES=stages, num_warps=warps, **shared,
    )  # fmt: skip
    columns = min(wide, merge_columns or wide) if near is None else wide
    _merge[(chunks.count, members * (wide // columns), batch)](
        acc, sums, chunks.slot, chunks.head, chunks.value, rows, out, lse,
        query, key, value, lengths, valid, table,
        ring, first, sink, key_place, offset, slots,
        scale, softcap or 1.0, size, chunks.count, splits, clusters, recent, ring_size, ring_from,
        kept, out.stride(0), out.stride(1), stride_t, 0 if offset is None else offset.stride(0),
        query.stride(0), query.stride(1), *key_strides, *value_strides,
        stride_mb, stride_table, *near_strides,
        COLUMNS=columns, SPLITS=triton.next_power_of_2(splits), GROUP=heads // groups,
        KV_HEADS=groups, NEAR=0 if near is None else triton.next_power_of_2(recent + sinks),
        HAS_OFFSET=offset is not None, HAS_SLOTS=slots is not None, HAS_LSE=lse is not None,
        num_warps=4, **shared, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
