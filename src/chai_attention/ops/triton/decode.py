"""Decode: one query per sequence, split over the context, then a merge of the splits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from chai_attention.ops.triton.chunks import Chunks

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores_base2(s, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of log2, softcap applied."""
    if HAS_SOFTCAP:
        # tanh from exp2, which saturates without overflow
        e = tl.exp2(tl.abs(s) * (2 * LOG2_E) / -softcap)
        s = softcap * tl.where(s < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    return s * LOG2_E


@triton.jit(do_not_specialize=["size", "chunks", "splits"])
def _decode(
    q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr,
    slot_ptr, key_ptr, value_ptr, acc_ptr, sum_ptr,
    scale, softcap, size, chunks, splits,
    stride_qb, stride_qk, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_mb,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One chunk of members, one split of the context: partial sums, their maximum and weight."""
    chunk, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(slot_ptr + row * chunks + chunk)
    if slot < 0:
        return
    length = tl.load(length_ptr + row).to(tl.int32) if HAS_LENGTH else size
    # whole blocks for every split, so that only the last block of all is cut
    each = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    start = split * each
    stop = tl.minimum(start + each, length)

    d = tl.arange(0, DP)
    column = tl.arange(0, M * DVP)
    lane, dv = column // DVP, column % DVP
    key = tl.load(key_ptr + row * chunks + chunk).to(tl.int64)
    place = tl.load(value_ptr + (row * chunks + chunk) * M + lane).to(tl.int64)
    in_value = (place >= 0) & (dv < DV)
    q = tl.load(q_ptr + row * stride_qb + slot * stride_qk + d, mask=d < D, other=0.0)
    q = q.to(tl.float32) * scale
    k_base = k_ptr + row * stride_kb + key * stride_kh + d
    v_base = v_ptr + row * stride_vb + place * stride_vh + dv

    best = float("-inf")
    weight = 0.0
    acc = tl.zeros([M * DVP], dtype=tl.float32)
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES):
        n = first + tl.arange(0, BLOCK)
        seen = n < stop
        n64 = n.to(tl.int64)
        k = tl.load(
            k_base[None, :] + n64[:, None] * stride_ks,
            mask=seen[:, None] & (d[None, :] < D), other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_base[None, :] + n64[:, None] * stride_vs,
            mask=seen[:, None] & in_value[None, :], other=0.0,
        )  # fmt: skip
        s = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
        s = _scores_base2(s, softcap, HAS_SOFTCAP)
        if HAS_VALID:
            seen = seen & (tl.load(valid_ptr + row * stride_mb + n, mask=seen, other=0) != 0)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(best, tl.max(s, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: weights of 0, not NaN
        p = tl.exp2(s - base)
        old = tl.exp2(best - base)
        weight = weight * old + tl.sum(p, axis=0)
        acc = acc * old + tl.sum(p[:, None] * v.to(tl.float32), axis=0)
        best = new
    if EARLY:
        gdc_launch_dependents()
    part = (row * chunks + chunk) * splits + split
    tl.store(acc_ptr + part * (M * DVP) + column, acc)
    tl.store(sum_ptr + part * 2, best)
    tl.store(sum_ptr + part * 2 + 1, weight)


@triton.jit(do_not_specialize=["chunks", "splits", "clusters"])
def _merge(
    acc_ptr, sum_ptr, slot_ptr, head_ptr, out_ptr, lse_ptr,
    chunks, splits, clusters, stride_ob, stride_oh,
    DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr,
    HAS_LSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one chunk's member and write its output."""
    chunk, lane, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = tl.load(head_ptr + (row * chunks + chunk) * M + lane)
    if head < 0:
        return
    if EARLY:
        gdc_wait()
    dv = tl.arange(0, DVP)
    split = tl.arange(0, SPLITS)
    part = (row * chunks + chunk) * splits + split
    there = split < splits
    best = tl.load(sum_ptr + part * 2, mask=there, other=float("-inf"))
    weight = tl.load(sum_ptr + part * 2 + 1, mask=there, other=0.0)
    top = tl.max(best, axis=0)
    factor = tl.where(best == float("-inf"), 0.0, tl.exp2(best - top))
    total = tl.sum(weight * factor, axis=0)
    acc = tl.load(
        acc_ptr + part[:, None] * (M * DVP) + lane * DVP + dv[None, :],
        mask=there[:, None] & (factor[:, None] > 0), other=0.0,
    )  # fmt: skip
    out = tl.sum(acc * factor[:, None], axis=0)
    out = tl.where(total > 0, out / tl.where(total > 0, total, 1.0), 0.0)
    target = out_ptr + row * stride_ob + head * stride_oh + dv
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=dv < DV)
    if HAS_LSE and lane == 0:
        slot = tl.load(slot_ptr + row * chunks + chunk)
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
    scale: float,
    softcap: float | None,
    lengths: Tensor | None,
    valid: Tensor | None,
    splits: int,
    block: int,
    warps: int,
    stages: int,
    early: bool,
) -> None:
    """Write ``out [B, 1, H, Dv]`` for ``query [B, k, 1, D]``; see `ops.reference.attention`.

    ``early`` lets the merge be launched while the last splits are still computed (Hopper and
    later).
    """
    batch, clusters, _, dim = query.shape
    value_dim = value.shape[3]
    members = chunks.head.shape[2]
    wide = padded(value_dim)
    parts = (batch, chunks.count, splits)
    acc = torch.empty(*parts, members * wide, dtype=torch.float32, device=query.device)
    sums = torch.empty(*parts, 2, dtype=torch.float32, device=query.device)
    _decode[(chunks.count, splits, batch)](
        query, key, value, lengths, valid,
        chunks.slot, chunks.key, chunks.value, acc, sums,
        scale, softcap or 1.0, key.shape[2], chunks.count, splits,
        query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3],
        0 if valid is None else valid.stride(0),
        D=dim, DP=padded(dim), DV=value_dim, DVP=wide, M=members,
        BLOCK=block, HAS_LENGTH=lengths is not None, HAS_VALID=valid is not None,
        HAS_SOFTCAP=softcap is not None, STAGES=stages, EARLY=early, num_warps=warps,
    )  # fmt: skip
    _merge[(chunks.count, members, batch)](
        acc, sums, chunks.slot, chunks.head, out, lse,
        chunks.count, splits, clusters, out.stride(0), out.stride(2),
        DV=value_dim, DVP=wide, M=members, SPLITS=triton.next_power_of_2(splits),
        HAS_LSE=lse is not None, EARLY=early, num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
