"""Decode: one query per sequence attends to a part of the context.

The same kernel serves contiguous caches and pages. `split_decode` merges the parts.
"""

from __future__ import annotations

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

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
def _near_row(row, slots_ptr, HAS_SLOTS: tl.constexpr):
    """Where the recent window's memories of a sequence are; a padded row may have slot -1."""
    if HAS_SLOTS:
        row = tl.maximum(tl.load(slots_ptr + row), 0).to(tl.int64)
    return row


@triton.jit
def _sink_stop(sink_ptr, near_row, stride_sinks, SINKS: tl.constexpr, SINKS_P: tl.constexpr):
    """The position behind the last sink: every real token before it is one."""
    s = tl.arange(0, SINKS_P)
    sinks = tl.load(sink_ptr + near_row * stride_sinks + s, mask=s < SINKS, other=-1)
    return tl.max(sinks.to(tl.int32), axis=0) + 1


@triton.jit(do_not_specialize=["size", "chunks", "streaming", "splits", "recent", "stride_table"])
def _decode(
    q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr, table_ptr, rows_ptr, slots_ptr, sink_ptr,
    query_ptr, key_ptr, value_ptr, acc_ptr, sum_ptr,
    scale, softcap, size, chunks, streaming, splits, recent,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_mb, stride_table, stride_t, stride_sinks,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr, SINKS_P: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_LENGTH: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_NEAR: tl.constexpr,
    STAGES: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One chunk of members, one split of the far keys: partial sums, their maximum and weight.

    Sums are kept for ``LINES`` keys at a time, which are those of different warps, and joined in
    the end. ``PAGE`` is 0 for contiguous caches. Pages are found by ``table_ptr``, and
    ``stride_kb`` and ``stride_vb`` are then those of a page.
    """
    # the first chunks are of streaming heads
    chunk, split = tl.program_id(0) + streaming, tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    line = _line_of(row, rows_ptr, stride_t, HAS_ROWS)
    slot = tl.load(query_ptr + line * chunks + chunk)
    if slot < 0:
        return
    if EARLY == 2:
        gdc_launch_dependents()
    length = tl.load(length_ptr + row).to(tl.int32) if HAS_LENGTH else size
    begin = 0
    if HAS_NEAR:
        length -= recent
        if SINKS > 0:
            near_row = _near_row(row, slots_ptr, HAS_SLOTS)
            begin = _sink_stop(sink_ptr, near_row, stride_sinks, SINKS, SINKS_P)
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
    acc = tl.zeros([LINES, M * DVP], dtype=tl.float32)
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
        parts = tl.reshape(p[:, None] * v.to(tl.float32), [BLOCK // LINES, LINES, M * DVP])
        acc = acc * old + tl.sum(parts, axis=0)
        best = new
    if EARLY == 1:
        gdc_launch_dependents()
    part = (row * chunks + chunk) * splits + split
    tl.store(acc_ptr + part * (M * DVP) + column, tl.sum(acc, axis=0))
    tl.store(sum_ptr + part * 2, best)
    tl.store(sum_ptr + part * 2 + 1, weight)


def padded(dim: int) -> int:
    """Head size a tile is made for: a power of two, and no less than a matrix product takes."""
    return max(16, triton.next_power_of_2(dim))
