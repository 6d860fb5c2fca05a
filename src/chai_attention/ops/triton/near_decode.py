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

ELEMENTS = 4096  # numbers of K that a step holds; with more, fewer programs run at a time


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
def _held(
    ptr, ring_ptr, first_ptr, place, kept, row, slot_row, position, at, j, d, inside, is_sink,
    table_ptr, stride_table, stride_b, stride_h, stride_s, stride_rb, stride_rh, stride_rs,
    stride_fb, stride_fh, stride_fs,
    D: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr, HAS_RING: tl.constexpr,
):  # fmt: skip
    """K or V of some tokens and one head, which the cache holds if its ``place`` is below ``kept``.

    What is masked out adds nothing.
    """
    in_head = d[None, :] < D
    stored = inside
    if HAS_RING:
        stored = inside & (place + tl.zeros_like(at) < kept)
    token = _token_at(position, row, table_ptr, stride_table, stride_b, stride_s, stored, PAGE)
    states = tl.load(
        ptr + place * stride_h + token[:, None] + d[None, :],
        mask=stored[:, None] & in_head, other=0.0,
    ).to(tl.float32)  # fmt: skip
    if HAS_RING:  # noqa: SIM102 - known when compiled
        if place >= kept:
            removed = place - kept
            states = tl.load(
                ring_ptr + slot_row * stride_rb + removed * stride_rh
                + at[:, None] * stride_rs + d[None, :],
                mask=(inside & (j >= SINKS))[:, None] & in_head, other=0.0,
            ).to(tl.float32)  # fmt: skip
            if SINKS > 0:
                states += tl.load(
                    first_ptr + slot_row * stride_fb + removed * stride_fh
                    + j.to(tl.int64)[:, None] * stride_fs + d[None, :],
                    mask=(inside & is_sink)[:, None] & in_head, other=0.0,
                ).to(tl.float32)  # fmt: skip
    return states


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
    # K and V stand in a cache, or in a ring and sinks: the same for all keys of a head
    at = ((position + ring_shift) % ring_size).to(tl.int64)
    k = _held(
        k_ptr, ring_ptr, first_ptr, where, kept, row, slot_row, position, at, j, d, inside, is_sink,
        table_ptr, stride_table, stride_kb, stride_kh, stride_ks, stride_rb, stride_rh, stride_rs,
        stride_fb, stride_fh, stride_fs, D, PAGE, SINKS, True,
    )  # fmt: skip
    v = _held(
        v_ptr, v_ring_ptr, v_first_ptr, place, kept_values, row, slot_row, position, at, j, dv,
        inside, is_sink, table_ptr, stride_table, stride_vb, stride_vh, stride_vs, stride_vrb,
        stride_vrh, stride_vrs, stride_vfb, stride_vfh, stride_vfs, DV, PAGE, SINKS, HAS_VALUE_RING,
    )  # fmt: skip
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
