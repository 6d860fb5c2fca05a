"""Decode in two launches: parts of the context, then their merge.

An exact recent window is the merge's work: while the last parts of the far keys are still
computed, it attends to each head's nearest keys, and joins both by their log-sum-exp.
"""

from __future__ import annotations

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from chai_attention.ops.ring import NearRing
from chai_attention.ops.triton.checks import by_line
from chai_attention.ops.triton.chunks import Chunks
from chai_attention.ops.triton.decode import LOG2_E, _decode, _line_of, _near_row, padded
from chai_attention.ops.triton.near_decode import _near, near_block


@triton.jit(
    do_not_specialize=[
        "size", "chunks", "streaming", "splits", "clusters", "recent", "ring_size", "ring_shift",
        "kept", "kept_values", "stride_table",
    ]
)  # fmt: skip
def _merge(
    acc_ptr, sum_ptr, slot_ptr, head_ptr, value_ptr, rows_ptr, out_ptr, lse_ptr,
    q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr, table_ptr,
    ring_ptr, first_ptr, sink_ptr, v_ring_ptr, v_first_ptr, key_place_ptr, offset_ptr, slots_ptr,
    scale, softcap, size, chunks, streaming, splits, clusters, recent, ring_size, ring_shift, kept,
    kept_values,
    stride_ob, stride_oh, stride_t, stride_offset,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_table, stride_rb, stride_rh, stride_rs, stride_fb, stride_fh, stride_fs,
    stride_sinks, stride_vrb, stride_vrh, stride_vrs, stride_vfb, stride_vfh, stride_vfs,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, NEAR: tl.constexpr,
    STEPS: tl.constexpr, SINKS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_LENGTH: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_OFFSET: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_LSE: tl.constexpr, HAS_VALUE_RING: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one chunk's member, and its nearest keys, and write its output.

    The first ``streaming`` chunks have nearest keys only. The columns of V may be dealt to several
    programs.
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
        near_row = _near_row(row, slots_ptr, HAS_SLOTS)
        place = tl.load(value_ptr + (line * chunks + chunk) * M + lane).to(tl.int64)
        near_best, near_weight, near_out = _near(
            head, place, row, near_row, line, length, dv,
            q_ptr, k_ptr, v_ptr, valid_ptr, table_ptr, ring_ptr, first_ptr, sink_ptr,
            v_ring_ptr, v_first_ptr, key_place_ptr, scale, softcap, recent, ring_size, ring_shift,
            kept, kept_values,
            stride_qb, stride_qk, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh,
            stride_vs, stride_mb, stride_table, stride_rb, stride_rh, stride_rs,
            stride_fb, stride_fh, stride_fs, stride_sinks,
            stride_vrb, stride_vrh, stride_vrs, stride_vfb, stride_vfh, stride_vfs,
            D, DP, DV, COLUMNS, GROUP, KV_HEADS, PAGE, NEAR, STEPS, SINKS, HAS_VALID, HAS_SOFTCAP,
            HAS_VALUE_RING,
        )  # fmt: skip
    if EARLY:
        gdc_wait()
    split = tl.arange(0, SPLITS)
    part = (row * chunks + chunk) * splits + split
    there = split < tl.where(chunk >= streaming, splits, 0)
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


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunks: Chunks,
    out: Tensor,
    lse: Tensor | None,
    *,
    clusters: int,
    kv_heads: int,
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
    lines: int = 1,
    early: int,
    merge_columns: int | None = None,
) -> None:
    """Write ``out [B, H, Dv]`` for ``query [B, k or H, D]``; see `ops.reference.attention`.

    Args:
        query: of the representatives in slot order, or of all heads in theirs.
        key: ``[B, kept, S, D]``, or pages ``[P, N, kept, D]`` if there is a ``table``.
        value: ``[B, kept values, S, Dv]``, or pages ``[P, N, kept values, Dv]``.
        chunks: the work; of one row for all sequences, of B rows, or of any number with ``rows``.
        out: any strides but the last.
        lse: ``[B, k]`` float32 or None; without ``near``.
        clusters: k.
        kv_heads: G.
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
        lines: keys of a block whose sums are kept apart until the end.
        early: when the merge may be launched (Hopper and later): 1 while the last parts are
            written, 2 as soon as they have begun; 0 behind them.
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
    kept, kept_values = key.shape[order[1]], value.shape[order[1]]
    size = 0 if paged else key.shape[2]
    every_head = query.shape[1] == heads
    stride_t = 0 if chunks.slot.shape[0] == 1 else 1
    sinks = 0 if near is None else near.sinks.shape[2]
    recent = 0 if near is None else near.recent
    ring = first = sink = value_ring = value_first = None
    ring_size, shift, near_strides, near_keys = 1, 0, [0] * 7, 0
    value_strides_near = [0] * 6
    if near is not None:
        ring, first, sink = near.ring, near.sinks, by_line(near.sink_positions)
        ring_size, shift = near.size, near.shift
        near_strides = [*ring.stride()[:3], *first.stride()[:3], sink.stride(0)]
        near_keys = near_block(recent + sinks, max(padded(dim), wide))
        value_ring, value_first = near.value_ring, near.value_sinks
        if value_ring is not None and value_first is not None:
            value_strides_near = [*value_ring.stride()[:3], *value_first.stride()[:3]]
    lengths, valid, table = by_line(lengths), by_line(valid), by_line(table)
    rows, slots, offset = by_line(rows), by_line(slots), by_line(offset)
    parts = (batch, chunks.count, splits)
    acc = torch.empty(*parts, members * wide, dtype=torch.float32, device=query.device)
    sums = torch.empty(*parts, 2, dtype=torch.float32, device=query.device)
    stride_mb = 0 if valid is None else valid.stride(0)
    stride_table = 0 if table is None else table.stride(0)
    shared = {
        "D": dim, "DP": padded(dim), "DV": value_dim, "DVP": wide, "M": members,
        "PAGE": page, "SINKS": sinks, "HAS_ROWS": rows is not None,
        "HAS_SLOTS": slots is not None, "HAS_LENGTH": lengths is not None,
        "HAS_VALID": valid is not None, "HAS_SOFTCAP": softcap is not None,
    }  # fmt: skip
    far_chunks = chunks.count - chunks.streaming
    early = early if far_chunks else 0  # nothing to wait for
    shared["EARLY"] = early
    if far_chunks:
        _decode[(far_chunks, splits, batch)](
            query, key, value, lengths, valid, table, rows, slots, sink,
            chunks.query if every_head else chunks.slot, chunks.key, chunks.value, acc, sums,
            scale, softcap or 1.0, size, chunks.count, chunks.streaming, splits, recent,
            query.stride(0), query.stride(1), *key_strides, *value_strides,
            stride_mb, stride_table, stride_t, near_strides[-1],
            BLOCK=block, SINKS_P=triton.next_power_of_2(max(1, sinks)), HAS_NEAR=near is not None,
            STAGES=stages, LINES=lines, num_warps=warps, **shared,
        )  # fmt: skip
    columns = min(wide, merge_columns or wide)
    _merge[(chunks.count, members * (wide // columns), batch)](
        acc, sums, chunks.slot, chunks.head, chunks.value, rows, out, lse,
        query, key, value, lengths, valid, table,
        ring, first, sink, value_ring, value_first, key_place, offset, slots,
        scale, softcap or 1.0, size, chunks.count, chunks.streaming, splits, clusters, recent,
        ring_size, shift, kept, kept_values,
        out.stride(0), out.stride(1), stride_t, 0 if offset is None else offset.stride(0),
        query.stride(0), query.stride(1), *key_strides, *value_strides,
        stride_mb, stride_table, *near_strides, *value_strides_near,
        COLUMNS=columns, SPLITS=triton.next_power_of_2(splits), GROUP=heads // kv_heads,
        KV_HEADS=kv_heads, NEAR=near_keys, STEPS=triton.cdiv(recent + sinks, max(1, near_keys)),
        HAS_OFFSET=offset is not None, HAS_LSE=lse is not None,
        HAS_VALUE_RING=value_ring is not None,
        num_warps=4, **shared, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
