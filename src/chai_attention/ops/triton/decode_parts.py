"""Decode: one query per sequence attends to a part of the far keys, or to its nearest ones.

The same kernel serves contiguous caches and pages; a second one merges the parts by their
log-sum-exp. `launch_decode` launches both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from chai_attention.ops.triton.decode import LOG2_E, _membership_of, _scores_base2
from chai_attention.ops.triton.local_decode import _sink_stop, local_part


@triton.jit(
    do_not_specialize=[
        "size", "local_programs", "head_tiles", "streaming", "splits", "recent", "ring_size",
        "ring_shift", "kept", "kept_values", "stride_table", "stride_local_table",
    ]
)  # fmt: skip
def _parts(
    q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr, table_ptr, ids_ptr,
    query_ptr, key_ptr, value_ptr, head_ptr, acc_ptr, sum_ptr,
    ring_ptr, first_ptr, v_ring_ptr, v_first_ptr, sink_ptr, local_table_ptr, key_place_ptr,
    scale, softcap, size, local_programs, head_tiles, streaming, splits, recent, ring_size,
    ring_shift, kept, kept_values,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_mb, stride_table, stride_t, stride_local_table,
    stride_rb, stride_rh, stride_rs, stride_vrb, stride_vrh, stride_vrs,
    stride_fb, stride_fh, stride_fs, stride_vfb, stride_vfh, stride_vfs, stride_sinks,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    LOCAL: tl.constexpr, STEPS: tl.constexpr, LOCAL_PAGE: tl.constexpr,
    SINKS: tl.constexpr, SINKS_P: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_LENGTH: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_VALUE_RING: tl.constexpr,
    STAGES: tl.constexpr, PARTIALS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head tile, one split of the far keys: partial sums, their maximum and weight.

    Or, in the first programs if there is a window (``LOCAL`` keys of a step), one member's nearest
    keys. Sums are kept for ``PARTIALS`` keys at a time, those of different warps, and joined in
    the end. ``PAGE`` is 0 for contiguous caches. Pages are found by ``table_ptr``, and
    ``stride_kb`` and ``stride_vb`` are then those of a page.
    """
    program = tl.program_id(0)
    sums = splits
    sets = splits  # of sums of V for all members
    if LOCAL > 0:
        sums += M
        sets += 1
        if program < local_programs:
            local_part(
                program, q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr, table_ptr, ids_ptr, value_ptr,
                head_ptr, acc_ptr, sum_ptr, ring_ptr, first_ptr, v_ring_ptr, v_first_ptr, sink_ptr,
                local_table_ptr, key_place_ptr, scale, softcap, size, head_tiles, splits, recent,
                ring_size, ring_shift, kept, kept_values,
                stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh,
                stride_vs, stride_mb, stride_table, stride_t, stride_local_table, stride_rb,
                stride_rh, stride_rs, stride_vrb, stride_vrh, stride_vrs, stride_fb, stride_fh,
                stride_fs, stride_vfb, stride_vfh, stride_vfs, stride_sinks,
                D, DP, DV, DVP, M, PAGE, GROUP, KV_HEADS, LOCAL, STEPS, LOCAL_PAGE, SINKS, HAS_IDS,
                HAS_LENGTH, HAS_VALID, HAS_SOFTCAP, HAS_VALUE_RING,
            )  # fmt: skip
            return
        program -= local_programs
    # the first head tiles are of streaming heads
    far = head_tiles - streaming
    head_tile, program = program % far + streaming, program // far
    split, row = program % splits, (program // splits).to(tl.int64)
    membership_id = _membership_of(row, ids_ptr, stride_t, HAS_IDS)
    slot = tl.load(query_ptr + membership_id * head_tiles + head_tile)
    if slot < 0:
        return
    length = tl.load(length_ptr + row).to(tl.int32) if HAS_LENGTH else size
    begin = 0
    if LOCAL > 0:
        length -= recent
        if LOCAL_PAGE > 0:
            begin = SINKS
        elif SINKS > 0:
            begin = _sink_stop(sink_ptr, row, stride_sinks, SINKS, SINKS_P)
    # whole blocks for every split, so that only the last block of all is cut; with pages the first
    # one too, since a block must lie in one page
    base = begin if PAGE == 0 else begin // BLOCK * BLOCK
    each = tl.cdiv(tl.cdiv(tl.maximum(length - base, 0), BLOCK), splits) * BLOCK
    start = base + split * each
    stop = tl.minimum(start + each, length)

    d = tl.arange(0, DP)
    column = tl.arange(0, M * DVP)
    lane, dv = column // DVP, column % DVP
    key = tl.load(key_ptr + membership_id * head_tiles + head_tile).to(tl.int64)
    place = tl.load(value_ptr + (membership_id * head_tiles + head_tile) * M + lane).to(tl.int64)
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
    acc = tl.zeros([PARTIALS, M * DVP], dtype=tl.float32)
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
        if LOCAL > 0 and SINKS > 0 and PAGE > 0:
            seen = seen & (n >= begin)
        if HAS_VALID:
            seen = seen & (tl.load(valid_ptr + row * stride_mb + n, mask=seen, other=0) != 0)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(best, tl.max(s, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: weight 0, not NaN
        p = tl.exp2(s - shift)
        old = tl.exp2(best - shift)
        weight = weight * old + tl.sum(p, axis=0)
        parts = tl.reshape(p[:, None] * v.to(tl.float32), [BLOCK // PARTIALS, PARTIALS, M * DVP])
        acc = acc * old + tl.sum(parts, axis=0)
        best = new
    if EARLY:
        gdc_launch_dependents()
    part = row * head_tiles + head_tile
    tl.store(acc_ptr + (part * sets + split) * (M * DVP) + column, tl.sum(acc, axis=0))
    tl.store(sum_ptr + (part * sums + split) * 2, best)
    tl.store(sum_ptr + (part * sums + split) * 2 + 1, weight)


@triton.jit(do_not_specialize=["head_tiles", "streaming", "splits", "clusters"])
def _merge(
    acc_ptr, sum_ptr, slot_ptr, head_ptr, ids_ptr, out_ptr, lse_ptr, offset_ptr,
    head_tiles, streaming, splits, clusters, stride_ob, stride_oh, stride_t, stride_offset,
    DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LOCAL: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_LSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one head tile's member, and its nearest keys, and write its output.

    The first ``streaming`` head tiles have nearest keys only. The columns of V may be dealt to
    several programs.
    """
    head_tile, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    lane, part_of = tl.program_id(1) % M, tl.program_id(1) // M
    membership_id = _membership_of(row, ids_ptr, stride_t, HAS_IDS)
    head = tl.load(head_ptr + (membership_id * head_tiles + head_tile) * M + lane)
    if head < 0:
        return
    dv = part_of * COLUMNS + tl.arange(0, COLUMNS)
    if EARLY:
        gdc_wait()
    split = tl.arange(0, SPLITS)
    there = split < tl.where(head_tile >= streaming, splits, 0)
    part = row * head_tiles + head_tile
    sums = part * splits
    sets = part * splits
    if HAS_LOCAL:
        sums += part * M
        sets += part
    best = tl.load(sum_ptr + (sums + split) * 2, mask=there, other=float("-inf"))
    weight = tl.load(sum_ptr + (sums + split) * 2 + 1, mask=there, other=0.0)
    if HAS_OFFSET:
        best += tl.load(offset_ptr + row * stride_offset + head) * LOG2_E
    top = tl.max(best, axis=0)
    if HAS_LOCAL:
        local_best = tl.load(sum_ptr + (sums + splits + lane) * 2)
        local_weight = tl.load(sum_ptr + (sums + splits + lane) * 2 + 1)
        local_out = tl.load(acc_ptr + ((sets + splits) * M + lane) * DVP + dv)
        top = tl.maximum(top, local_best)
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen at all: zeros, not NaN
    factor = tl.exp2(best - base)
    total = tl.sum(weight * factor, axis=0)
    acc = tl.load(
        acc_ptr + (sets + split)[:, None] * (M * DVP) + lane * DVP + dv[None, :],
        mask=there[:, None] & (factor[:, None] > 0), other=0.0,
    )  # fmt: skip
    out = tl.sum(acc * factor[:, None], axis=0)
    if HAS_LOCAL:
        share = tl.exp2(local_best - base)
        total += local_weight * share
        out += local_out * share
    out = tl.where(total > 0, out / tl.where(total > 0, total, 1.0), 0.0)
    target = out_ptr + row * stride_ob + head * stride_oh + dv
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=dv < DV)
    if HAS_LSE and tl.program_id(1) == 0:
        slot = tl.load(slot_ptr + membership_id * head_tiles + head_tile)
        lse = (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2_E
        tl.store(lse_ptr + row * clusters + slot, tl.where(total > 0, lse, float("-inf")))
