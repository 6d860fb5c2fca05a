"""One query's attention to its nearest keys in pages, where they are all that its head sees.

Layers, or parts of one, whose heads all stream have no far keys: nothing is left to merge, and a
program writes the output of all query heads of a K/V head itself, whose K and V it reads once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.triton.checks import by_row, page_strides
from chai_attention.ops.triton.decode import _scores_base2, padded
from chai_attention.ops.triton.launch_prefill import precision_of
from chai_attention.ops.triton.sizes import cdiv, power_of_2

TILE_BYTES = 8192  # of K, and of V, that a program brings at a time
STAGES = 3  # of the loads: the next pages are looked up while K and V of these are on their way
WARPS = 4


@triton.jit(
    do_not_specialize=["groups", "recent", "stride_table"],
    do_not_specialize_on_alignment=["length_ptr", "table_ptr"],
)
def _local_only(
    q_ptr, k_ptr, v_ptr, length_ptr, table_ptr, out_ptr, scale, softcap, groups, recent,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_table, stride_ob, stride_oh,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, LOCAL: tl.constexpr, STEPS: tl.constexpr, PAGE: tl.constexpr,
    SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sinks and the last ``recent`` keys of one K/V head, LOCAL of them at a time.

    Its GROUP query heads are rows of the products, which have ROWS at least.
    """
    group, row = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    place = group.to(tl.int64)
    length = tl.load(length_ptr + row).to(tl.int32)
    lane = tl.arange(0, ROWS)
    head = (group * GROUP + lane).to(tl.int64)
    is_head = (lane < GROUP)[:, None]
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    q = tl.load(
        q_ptr + row * stride_qb + head[:, None] * stride_qh + d[None, :],
        mask=is_head & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, DVP], dtype=tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        j = step * LOCAL + tl.arange(0, LOCAL)
        position = length - recent + j - SINKS
        inside = (j >= SINKS) & (position >= 0) & (position < length)
        if SINKS > 0:
            # a sink among the last keys counts once, there
            inside = inside | ((j < SINKS) & (j < length - recent))
            position = tl.where(j < SINKS, j, position)
        page = tl.load(table_ptr + row * stride_table + position // PAGE, mask=inside, other=0)
        page, at = page.to(tl.int64), (position % PAGE).to(tl.int64)
        k = tl.load(
            k_ptr + place * stride_kh + (page * stride_kb + at * stride_ks)[:, None] + d[None, :],
            mask=inside[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_ptr + place * stride_vh + (page * stride_vb + at * stride_vs)[:, None] + dv[None, :],
            mask=inside[:, None] & (dv < DV)[None, :], other=0.0,
        )  # fmt: skip
        # numbers of 8 bits are numbers of 16 bits, too
        k, v = k.to(q.dtype), v.to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [ROWS, LOCAL]
        s = _scores_base2(s, softcap, HAS_SOFTCAP)
        s = tl.where(inside[None, :], s, float("-inf"))
        new = tl.maximum(best, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen: weight 0, not NaN
        p = tl.exp2(s - base[:, None])
        old = tl.exp2(best - base)
        weight = weight * old + tl.sum(p, axis=1)
        rounded = p.to(q.dtype)
        acc = tl.dot(rounded, v, acc * old[:, None], input_precision=PRECISION)
        if q.dtype.primitive_bitwidth == 16:
            # what rounding takes off a weight: products with 16 bits add up to about 16 digits
            acc = tl.dot((p - rounded.to(tl.float32)).to(q.dtype), v, acc)
        best = new
    out = tl.where((weight > 0)[:, None], acc / tl.where(weight > 0, weight, 1.0)[:, None], 0.0)
    tl.store(
        out_ptr + row * stride_ob + head[:, None] * stride_oh + dv[None, :],
        out.to(out_ptr.dtype.element_ty), mask=is_head & (dv < DV)[None, :],
    )  # fmt: skip


def sees_local_only(membership: Membership, local: LocalPages) -> bool:
    """Whether all heads stream and local pages hold all their K and V, in their natural order."""
    held = {local.key.shape[2], local.value.shape[2]}
    return membership.far is None and held == {membership.kv_heads}


def decode_local_only(
    query: Tensor,
    local: LocalPages,
    out: Tensor,
    *,
    lengths: Tensor,
    scale: float,
    softcap: float | None = None,
) -> None:
    """Write ``out [B, H, Dv]`` of heads that see local keys only, in one launch.

    Args:
        query: ``[B, H, D]``.
        local: pages of all their K/V heads.
        out: any strides but the last.
        lengths: ``[B]`` int32, keys of each sequence, the new one included; 0 gives zeros.
        scale: factor on the scores.
        softcap: as in the reference.
    """
    batch, heads, dim = query.shape
    groups, value_dim = local.value.shape[2:]
    wide = max(padded(dim), padded(value_dim))
    keys = local.recent + local.sinks
    block = min(max(16, power_of_2(keys)), max(16, TILE_BYTES // (wide * query.element_size())))
    lengths, table = by_row(lengths), by_row(local.block_table)
    _local_only[(batch * groups,)](
        query, local.key, local.value, lengths, table, out, scale, softcap or 1.0, groups,
        local.recent, *query.stride()[:2],
        *page_strides(local.key), *page_strides(local.value), table.stride(0), *out.stride()[:2],
        D=dim, DP=padded(dim), DV=value_dim, DVP=padded(value_dim), GROUP=heads // groups,
        ROWS=padded(heads // groups), LOCAL=block, STEPS=cdiv(keys, block), PAGE=local.page,
        SINKS=local.sinks, HAS_SOFTCAP=softcap is not None, PRECISION=precision_of(query),
        STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
