"""One query's exact attention to its nearest keys: the sinks and the last ones, by own scores.

The kernel of the far keys (`decode_parts`) calls it in programs of their own, which start first.
Kept heads find their local K and V in the cache, the others in rings and sinks beside a dense
cache, or in local pages beside far ones.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from chai_attention.ops.triton.decode import _membership_of, _scores_base2
from chai_attention.ops.triton.sizes import power_of_2

ELEMENTS = 1024  # numbers of K that a step holds for each warp: more would need more registers


def local_block(keys: int, dim: int, warps: int) -> int:
    """How many of ``keys`` nearest keys a step takes, for heads of ``dim`` numbers."""
    return int(min(power_of_2(keys), max(16, warps * ELEMENTS // dim)))


@triton.jit
def _sink_stop(sink_ptr, row, stride_sinks, SINKS: tl.constexpr, SINKS_P: tl.constexpr):
    """The position behind the last sink: every real token before it is one."""
    s = tl.arange(0, SINKS_P)
    sinks = tl.load(sink_ptr + row * stride_sinks + s, mask=s < SINKS, other=-1)
    return tl.max(sinks.to(tl.int32), axis=0) + 1


@triton.jit
def _held(
    ptr, ring_ptr, first_ptr, place, kept, row, position, at, j, d, inside, is_sink,
    stride_b, stride_h, stride_s, stride_rb, stride_rh, stride_rs, stride_fb, stride_fh, stride_fs,
    D: tl.constexpr, SINKS: tl.constexpr, HAS_RING: tl.constexpr,
):  # fmt: skip
    """K or V of some tokens and one head, which a dense cache holds if ``place`` is below ``kept``.

    What is masked out adds nothing.
    """
    in_head = d[None, :] < D
    stored = inside
    if HAS_RING:
        stored = inside & (place + tl.zeros_like(at) < kept)
    states = tl.load(
        ptr + row * stride_b + place * stride_h
        + position.to(tl.int64)[:, None] * stride_s + d[None, :],
        mask=stored[:, None] & in_head, other=0.0,
    ).to(tl.float32)  # fmt: skip
    if HAS_RING:  # noqa: SIM102 - known when compiled
        if place >= kept:
            removed = place - kept
            states = tl.load(
                ring_ptr + row * stride_rb + removed * stride_rh
                + at[:, None] * stride_rs + d[None, :],
                mask=(inside & (j >= SINKS))[:, None] & in_head, other=0.0,
            ).to(tl.float32)  # fmt: skip
            if SINKS > 0:
                states += tl.load(
                    first_ptr + row * stride_fb + removed * stride_fh
                    + j.to(tl.int64)[:, None] * stride_fs + d[None, :],
                    mask=(inside & is_sink)[:, None] & in_head, other=0.0,
                ).to(tl.float32)  # fmt: skip
    return states


@triton.jit
def _in_pages(
    ptr, local_ptr, place, kept, row, position, d, inside, table_ptr, local_table_ptr,
    stride_table, stride_local_table, stride_b, stride_h, stride_s, stride_nb, stride_nh, stride_ns,
    D: tl.constexpr, PAGE: tl.constexpr, LOCAL_PAGE: tl.constexpr,
):  # fmt: skip
    """K or V of some tokens and one head, out of far pages if ``place`` is below ``kept``."""
    is_far = place < kept
    base = tl.where(is_far, ptr + place * stride_h, local_ptr + (place - kept) * stride_nh)
    table = tl.where(
        is_far, table_ptr + row * stride_table, local_table_ptr + row * stride_local_table
    )
    stride_b = tl.where(is_far, stride_b, stride_nb)
    stride_s = tl.where(is_far, stride_s, stride_ns)
    number = tl.where(is_far, position // PAGE, position // LOCAL_PAGE)
    within = tl.where(is_far, position % PAGE, position % LOCAL_PAGE)
    page = tl.load(table + number, mask=inside, other=0).to(tl.int64)
    at = page * stride_b + within.to(tl.int64) * stride_s
    return tl.load(
        base + at[:, None] + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0
    )


@triton.jit
def local_part(
    program, q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr, table_ptr, ids_ptr, value_ptr, head_ptr,
    acc_ptr, sum_ptr, ring_ptr, first_ptr, v_ring_ptr, v_first_ptr, sink_ptr, local_table_ptr,
    key_place_ptr, scale, softcap, size, head_tiles, splits, recent, ring_size, ring_shift, kept,
    kept_values,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_table, stride_t, stride_local_table, stride_rb, stride_rh, stride_rs,
    stride_vrb, stride_vrh, stride_vrs, stride_fb, stride_fh, stride_fs, stride_vfb, stride_vfh,
    stride_vfs, stride_sinks,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    PAGE: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, LOCAL: tl.constexpr,
    STEPS: tl.constexpr, LOCAL_PAGE: tl.constexpr, SINKS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_LENGTH: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_VALUE_RING: tl.constexpr,
):  # fmt: skip
    """One member's nearest keys, a part behind the ``splits`` parts of its head tile's far keys.

    ``ring_ptr`` and ``v_ring_ptr`` are rings, or local pages if there is a ``LOCAL_PAGE``.
    """
    lane, program = program % M, program // M
    head_tile, row = program % head_tiles, (program // head_tiles).to(tl.int64)
    membership_id = _membership_of(row, ids_ptr, stride_t, HAS_IDS)
    lane_at = (membership_id * head_tiles + head_tile) * M + lane
    head = tl.load(head_ptr + lane_at)
    if head >= 0:
        length = tl.load(length_ptr + row).to(tl.int32) if HAS_LENGTH else size
        place = tl.load(value_ptr + lane_at).to(tl.int64)
        dv = tl.arange(0, DVP)
        d = tl.arange(0, DP)
        q = tl.load(q_ptr + row * stride_qb + head * stride_qk + d, mask=d < D, other=0.0)
        q = q.to(tl.float32) * scale
        where = tl.load(key_place_ptr + membership_id * KV_HEADS + head // GROUP).to(tl.int64)
        # each key of a step has sums of its own until the end: those of a step would have to wait
        # for all warps, time and again
        best = tl.full([LOCAL], float("-inf"), dtype=tl.float32)
        weight = tl.zeros([LOCAL], dtype=tl.float32)
        acc = tl.zeros([LOCAL, DVP], dtype=tl.float32)
        for step in tl.range(0, STEPS, num_stages=1):
            # the sinks, and then the last keys
            j = step * LOCAL + tl.arange(0, LOCAL)
            is_sink = j < SINKS
            position = length - recent + j - SINKS
            inside = (j >= SINKS) & (position >= 0) & (position < length)
            if SINKS > 0:
                sink = j  # of a sequence in pages: its first tokens
                if LOCAL_PAGE == 0:
                    sink = tl.load(sink_ptr + row * stride_sinks + j, mask=is_sink, other=-1)
                    sink = sink.to(tl.int32)
                # a sink among the last keys counts once, there
                position = tl.where(is_sink, sink, position)
                inside = inside | (is_sink & (sink >= 0) & (sink < length - recent))
            if HAS_VALID:
                inside = inside & (
                    tl.load(valid_ptr + row * stride_mb + position, mask=inside, other=0) != 0
                )
            if LOCAL_PAGE > 0:
                k = _in_pages(
                    k_ptr, ring_ptr, where, kept, row, position, d, inside, table_ptr,
                    local_table_ptr, stride_table, stride_local_table, stride_kb, stride_kh,
                    stride_ks, stride_rb, stride_rh, stride_rs, D, PAGE, LOCAL_PAGE,
                )  # fmt: skip
                v = _in_pages(
                    v_ptr, v_ring_ptr, place, kept_values, row, position, dv, inside, table_ptr,
                    local_table_ptr, stride_table, stride_local_table, stride_vb, stride_vh,
                    stride_vs, stride_vrb, stride_vrh, stride_vrs, DV, PAGE, LOCAL_PAGE,
                )  # fmt: skip
                k, v = k.to(tl.float32), v.to(tl.float32)
            else:
                # K and V stand in a cache, or in a ring and sinks: the same for all keys of a head
                at = ((position + ring_shift) % ring_size).to(tl.int64)
                k = _held(
                    k_ptr, ring_ptr, first_ptr, where, kept, row, position, at, j, d, inside,
                    is_sink, stride_kb, stride_kh, stride_ks, stride_rb, stride_rh, stride_rs,
                    stride_fb, stride_fh, stride_fs, D, SINKS, True,
                )  # fmt: skip
                v = _held(
                    v_ptr, v_ring_ptr, v_first_ptr, place, kept_values, row, position, at, j, dv,
                    inside, is_sink, stride_vb, stride_vh, stride_vs, stride_vrb, stride_vrh,
                    stride_vrs, stride_vfb, stride_vfh, stride_vfs, DV, SINKS, HAS_VALUE_RING,
                )  # fmt: skip
            s = _scores_base2(tl.sum(k * q[None, :], axis=1), softcap, HAS_SOFTCAP)
            s = tl.where(inside, s, float("-inf"))
            new = tl.maximum(best, s)
            base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen: weight 0, not NaN
            p = tl.exp2(s - base)
            old = tl.exp2(best - base)
            weight = weight * old + p
            acc = acc * old[:, None] + p[:, None] * v
            best = new
        top = tl.max(best, axis=0)
        share = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top))
        total, out = tl.sum(weight * share, axis=0), tl.sum(acc * share[:, None], axis=0)
        part = row * head_tiles + head_tile
        sets, sums = splits + 1, splits + M
        tl.store(acc_ptr + ((part * sets + splits) * M + lane) * DVP + dv, out)
        tl.store(sum_ptr + (part * sums + splits + lane) * 2, top)
        tl.store(sum_ptr + (part * sums + splits + lane) * 2 + 1, total)


@triton.jit(
    do_not_specialize=[
        "head_tiles", "splits", "recent", "kept", "kept_values", "stride_table",
        "stride_local_table",
    ],
    do_not_specialize_on_alignment=[
        "length_ptr", "table_ptr", "ids_ptr", "value_ptr", "head_ptr", "local_table_ptr",
    ],
)  # fmt: skip
def local_parts(
    q_ptr, k_ptr, v_ptr, length_ptr, table_ptr, ids_ptr, value_ptr, head_ptr, acc_ptr, sum_ptr,
    local_k_ptr, local_v_ptr, local_table_ptr, key_place_ptr,
    scale, softcap, head_tiles, splits, recent, kept, kept_values,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_table, stride_t, stride_local_table, stride_nkb, stride_nkh, stride_nks,
    stride_nvb, stride_nvh, stride_nvs,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    PAGE: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, LOCAL: tl.constexpr,
    STEPS: tl.constexpr, LOCAL_PAGE: tl.constexpr, SINKS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The nearest keys in pages alone, while the kernel before this one attends to the far ones."""
    gdc_launch_dependents()
    local_part(
        tl.program_id(0), q_ptr, k_ptr, v_ptr, length_ptr, None, table_ptr, ids_ptr, value_ptr,
        head_ptr, acc_ptr, sum_ptr, local_k_ptr, None, local_v_ptr, None, None, local_table_ptr,
        key_place_ptr, scale, softcap, 0, head_tiles, splits, recent, 1, 0, kept, kept_values,
        stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
        0, stride_table, stride_t, stride_local_table, stride_nkb, stride_nkh, stride_nks,
        stride_nvb, stride_nvh, stride_nvs, 0, 0, 0, 0, 0, 0, 0,
        D, DP, DV, DVP, M, PAGE, GROUP, KV_HEADS, LOCAL, STEPS, LOCAL_PAGE, SINKS, HAS_IDS,
        True, False, HAS_SOFTCAP, False,
    )  # fmt: skip
    gdc_wait()  # the merge waits for the end of this kernel alone, which so is that of both
