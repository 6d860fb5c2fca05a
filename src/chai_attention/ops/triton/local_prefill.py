"""The exact part of windowed prefill: every head's own scores of its nearest keys.

A tile of queries starts from what clustered attention found among the far keys, as if that were
one key with their log-sum-exp as its score and their output as its V, and goes on with the sinks
and its band of keys. `ops.local` is the same in PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chai_attention.ops.call import AttentionCall
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.triton.decode import LOG2_E, padded
from chai_attention.ops.triton.launch_prefill import precision_of
from chai_attention.ops.triton.prefill import _go_on
from chai_attention.ops.triton.sizes import cdiv, power_of_2
from chai_attention.ops.windowed import WindowTables

BLOCK = 32  # keys of a step


@triton.jit(do_not_specialize=["queries", "length", "columns", "late", "recent"])
def _local(
    q_ptr, k_ptr, v_ptr, sink_ptr, ordinary_ptr, far_ptr, lse_ptr, slot_ptr, place_ptr, offset_ptr,
    out_ptr,
    scale, softcap, queries, length, columns, late, recent,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_sinks, stride_ordinary,
    stride_fb, stride_fs, stride_fh, stride_lb, stride_lk, stride_slot, stride_offset,
    stride_ob, stride_os, stride_oh,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SINKS: tl.constexpr, SINKS_P: tl.constexpr,
    HAS_FAR: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One head, ROWS queries."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i64 = i.to(tl.int64)
    inside = i < queries
    position = length - queries + i
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    q = tl.load(
        q_ptr + row * stride_qb + head * stride_qh + i64[:, None] * stride_qs + d[None, :],
        mask=inside[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    k_base = k_ptr + row * stride_kb + (head // GROUP) * stride_kh
    v_base = v_ptr + row * stride_vb + (head // GROUP) * stride_vh
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, DVP], dtype=tl.float32)
    if HAS_FAR:
        far = i - (queries - late)  # the first queries see no far keys
        has = inside & (far >= 0)
        slot = tl.load(slot_ptr + row * stride_slot + head)
        best = tl.load(
            lse_ptr + row * stride_lb + slot * stride_lk + far, mask=has, other=float("-inf")
        )
        if HAS_OFFSET:
            best += tl.load(offset_ptr + row * stride_offset + head)
        best *= LOG2_E
        has = best > float("-inf")
        weight = tl.where(has, 1.0, 0.0)
        place = tl.load(place_ptr + head)  # any for streaming heads, whose offset says so
        acc = tl.load(
            far_ptr + row * stride_fb + far.to(tl.int64)[:, None] * stride_fs + place * stride_fh
            + dv[None, :],
            mask=has[:, None] & (dv < DV)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
    if SINKS > 0:
        j = tl.arange(0, SINKS_P)
        # sinks that a sequence lacks stand behind all queries
        sink = tl.load(sink_ptr + row * stride_sinks + j, mask=j < SINKS, other=length)
        sink_at = j.to(tl.int64)
        best, weight, acc = _go_on(
            q, k_base, v_base, sink_at * stride_ks, sink_at * stride_vs, sink < length,
            sink[None, :] <= position[:, None], best, weight, acc, d, dv, scale, softcap,
            D, DV, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    begin = tl.maximum(length - queries + tl.program_id(0) * ROWS - recent + 1, 0)
    stop = tl.minimum(length - queries + (tl.program_id(0) + 1) * ROWS, length)
    for start in range(begin, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        there = n < stop
        there = there & (
            tl.load(ordinary_ptr + row * stride_ordinary + n, mask=there, other=0) != 0
        )
        seen = (n[None, :] <= position[:, None]) & (n[None, :] > position[:, None] - recent)
        at = (SINKS + n - (length - columns)).to(tl.int64)
        best, weight, acc = _go_on(
            q, k_base, v_base, at * stride_ks, at * stride_vs, there, seen & there[None, :], best,
            weight, acc, d, dv, scale, softcap, D, DV, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    acc = tl.where(weight[:, None] > 0, acc / tl.where(weight > 0, weight, 1.0)[:, None], 0.0)
    tl.store(
        out_ptr + row * stride_ob + i64[:, None] * stride_os + head * stride_oh + dv[None, :],
        acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (dv < DV)[None, :],
    )  # fmt: skip


def merge_local(
    query: Tensor,
    local: LocalKeys,
    tables: WindowTables,
    far: tuple[Tensor, Tensor] | None,
    call: AttentionCall,
) -> Tensor:
    """Join the nearest keys with what clustered attention found among the others.

    Args:
        query: ``[B, H, Q, D]``, all heads.
        local: the local keys.
        tables: of these Q queries.
        far: what `AttentionBackend.attend_far` found; None if there are no far keys.
        call: how.

    Returns:
        ``[B, Q, H, Dv]`` in the dtype of V; zeros for a query that sees no key.
    """
    batch, heads, queries, dim = query.shape
    groups, value_dim = local.value.shape[1], local.value.shape[3]
    shape = (batch, queries, heads, value_dim)
    out = torch.empty(shape, dtype=local.value.dtype, device=query.device)
    # of a program: what registers allow
    rows = 32 if query.dtype.itemsize == 4 or max(dim, value_dim) > 128 else 64
    rows = min(rows, max(16, power_of_2(queries)))
    sinks = tables.sinks
    shared = tables.ordinary.shape[0] == 1  # all sequences of the batch have the same tables
    far_out, lse = far or (None, None)
    softcap, offset, member = call.softcap, call.offset, call.membership
    slot = member.slot
    _local[(cdiv(queries, rows), heads, batch)](
        query, local.key, local.value, tables.sink_positions, tables.ordinary, far_out,
        lse, slot, member.far_place, offset, out,
        call.scale, softcap or 1.0, queries, tables.length, local.key.shape[2] - sinks,
        0 if far_out is None else far_out.shape[1], tables.recent,
        *query.stride()[:3], *local.key.stride()[:3], *local.value.stride()[:3],
        *(0 if shared else x.stride(0) for x in (tables.sink_positions, tables.ordinary)),
        *((0, 0, 0) if far_out is None else far_out.stride()[:3]),
        *((0, 0) if lse is None else lse.stride()[:2]), slot.stride(0),
        0 if offset is None else offset.stride(0), *out.stride()[:3],
        D=dim, DP=padded(dim), DV=value_dim, DVP=padded(value_dim), GROUP=heads // groups,
        ROWS=rows, BLOCK=BLOCK, SINKS=sinks, SINKS_P=max(16, power_of_2(sinks)),
        HAS_FAR=far_out is not None, HAS_OFFSET=offset is not None,
        HAS_SOFTCAP=softcap is not None, PRECISION=precision_of(query), num_warps=4,
        num_stages=2,
    )  # fmt: skip
    return out
