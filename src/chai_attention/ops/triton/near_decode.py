"""One query's exact attention to its nearest keys: the sinks and the last ones, by own scores.

A function of the kernel that merges the parts of the far keys (`split_decode`).
"""

from __future__ import annotations

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
import triton
import triton.language as tl

from chai_attention.ops.triton.decode import _scores_base2

ELEMENTS = 8192  # numbers of K that a step holds; more spill


def near_block(keys: int, dim: int) -> int:
    """How many of ``keys`` nearest keys a step takes, for heads of ``dim`` numbers."""
    return int(min(triton.next_power_of_2(keys), max(16, ELEMENTS // dim)))


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
def _step(
    start, q, where, row, slot_row, length, place, d, dv,
    k_ptr, v_ptr, valid_ptr, table_ptr, ring_ptr, first_ptr, sink_ptr, v_ring_ptr, v_first_ptr,
    softcap, recent, ring_size, ring_shift, kept, kept_values,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_mb, stride_table,
    stride_rb, stride_rh, stride_rs, stride_fb, stride_fh, stride_fs, stride_sinks,
    stride_vrb, stride_vrh, stride_vrs, stride_vfb, stride_vfh, stride_vfs,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, NEAR: tl.constexpr,
    SINKS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_VALUE_RING: tl.constexpr,
):  # fmt: skip
    """Scores of NEAR keys from ``start`` on, of the sinks and then the last ones, and their V."""
    j = start + tl.arange(0, NEAR)
    is_sink = j < SINKS
    position = length - recent + j - SINKS
    inside = (j >= SINKS) & (position >= 0) & (position < length)
    if SINKS > 0:
        sink = tl.load(sink_ptr + slot_row * stride_sinks + j, mask=is_sink, other=-1)
        sink = sink.to(tl.int32)
        # a sink among the last keys counts once, there
        position = tl.where(is_sink, sink, position)
        inside = inside | (is_sink & (sink >= 0) & (sink < length - recent))
    if HAS_VALID:
        inside = inside & (
            tl.load(valid_ptr + row * stride_mb + position, mask=inside, other=0) != 0
        )
    in_key = d[None, :] < D
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
        + ((position + ring_shift) % ring_size).to(tl.int64)[:, None] * stride_rs + d[None, :],
        mask=(absent & (j >= SINKS))[:, None] & in_key, other=0.0,
    ).to(tl.float32)  # fmt: skip
    if SINKS > 0:
        k += tl.load(
            first_ptr + slot_row * stride_fb + removed * stride_fh
            + j.to(tl.int64)[:, None] * stride_fs + d[None, :],
            mask=(absent & is_sink)[:, None] & in_key, other=0.0,
        ).to(tl.float32)  # fmt: skip
    at = _token_at(position, row, table_ptr, stride_table, stride_vb, stride_vs, inside, PAGE)
    in_value = dv[None, :] < DV
    stored, absent = inside, inside
    if HAS_VALUE_RING:  # V of streaming heads stands as K of removed heads does
        stored = inside & (place + tl.zeros([NEAR], tl.int64) < kept_values)
        absent = inside & (place + tl.zeros([NEAR], tl.int64) >= kept_values)
    v = tl.load(
        v_ptr + place * stride_vh + at[:, None] + dv[None, :],
        mask=stored[:, None] & in_value, other=0.0,
    ).to(tl.float32)  # fmt: skip
    if HAS_VALUE_RING:
        removed = place - kept_values
        v += tl.load(
            v_ring_ptr + slot_row * stride_vrb + removed * stride_vrh
            + ((position + ring_shift) % ring_size).to(tl.int64)[:, None] * stride_vrs
            + dv[None, :],
            mask=(absent & (j >= SINKS))[:, None] & in_value, other=0.0,
        ).to(tl.float32)  # fmt: skip
        if SINKS > 0:
            v += tl.load(
                v_first_ptr + slot_row * stride_vfb + removed * stride_vfh
                + j.to(tl.int64)[:, None] * stride_vfs + dv[None, :],
                mask=(absent & is_sink)[:, None] & in_value, other=0.0,
            ).to(tl.float32)  # fmt: skip
    s = _scores_base2(tl.sum(k * q[None, :], axis=1), softcap, HAS_SOFTCAP)
    return tl.where(inside, s, float("-inf")), v


@triton.jit
def _near(
    head, place, row, slot_row, line, length, dv,
    q_ptr, k_ptr, v_ptr, valid_ptr, table_ptr, ring_ptr, first_ptr, sink_ptr, v_ring_ptr,
    v_first_ptr, key_place_ptr,
    scale, softcap, recent, ring_size, ring_shift, kept, kept_values,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_table, stride_rb, stride_rh, stride_rs, stride_fb, stride_fh, stride_fs,
    stride_sinks, stride_vrb, stride_vrh, stride_vrs, stride_vfb, stride_vfh, stride_vfs,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, NEAR: tl.constexpr,
    STEPS: tl.constexpr, SINKS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_VALUE_RING: tl.constexpr,
):  # fmt: skip
    """Maximum and weight of one head's own scores, and V weighted with them, columns ``dv``."""
    d = tl.arange(0, DP)
    q = tl.load(q_ptr + row * stride_qb + head * stride_qk + d, mask=d < D, other=0.0)
    q = q.to(tl.float32) * scale
    where = tl.load(key_place_ptr + line * KV_HEADS + head // GROUP).to(tl.int64)
    s, v = _step(
        0, q, where, row, slot_row, length, place, d, dv,
        k_ptr, v_ptr, valid_ptr, table_ptr, ring_ptr, first_ptr, sink_ptr, v_ring_ptr, v_first_ptr,
        softcap, recent, ring_size, ring_shift, kept, kept_values,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_mb, stride_table,
        stride_rb, stride_rh, stride_rs, stride_fb, stride_fh, stride_fs, stride_sinks,
        stride_vrb, stride_vrh, stride_vrs, stride_vfb, stride_vfh, stride_vfs,
        D, DV, PAGE, NEAR, SINKS, HAS_VALID, HAS_SOFTCAP, HAS_VALUE_RING,
    )  # fmt: skip
    best = tl.max(s, axis=0)
    p = tl.exp2(s - tl.where(best == float("-inf"), 0.0, best))  # nothing seen: 0, not NaN
    weight = tl.sum(p, axis=0)
    acc = tl.sum(p[:, None] * v, axis=0)
    # the usual window is one step, which needs fewer registers than a loop
    if STEPS > 1:
        for step in tl.range(1, STEPS, num_stages=1):
            s, v = _step(
                step * NEAR, q, where, row, slot_row, length, place, d, dv,
                k_ptr, v_ptr, valid_ptr, table_ptr, ring_ptr, first_ptr, sink_ptr, v_ring_ptr,
                v_first_ptr, softcap, recent, ring_size, ring_shift, kept, kept_values,
                stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_mb,
                stride_table, stride_rb, stride_rh, stride_rs, stride_fb, stride_fh, stride_fs,
                stride_sinks, stride_vrb, stride_vrh, stride_vrs, stride_vfb, stride_vfh,
                stride_vfs, D, DV, PAGE, NEAR, SINKS, HAS_VALID, HAS_SOFTCAP, HAS_VALUE_RING,
            )  # fmt: skip
            new = tl.maximum(best, tl.max(s, axis=0))
            base = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - base)
            old = tl.exp2(best - base)
            weight = weight * old + tl.sum(p, axis=0)
            acc = acc * old + tl.sum(p[:, None] * v, axis=0)
            best = new
    return best, weight, acc
