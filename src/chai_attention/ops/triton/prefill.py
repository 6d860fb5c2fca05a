"""Prefill: causal attention in tiles; scores and softmax once for several members' V."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from chai_attention.ops.triton.chunks import Chunks
from chai_attention.ops.triton.decode import LOG2_E, _scores_base2, padded


@triton.jit
def _tile(
    q, k_base, v_base, valid_base, first, stop, position, best, weight, acc, d, in_value,
    k_tiles, v_tiles, row, key, v_column,
    scale, softcap, stride_ks, stride_vs,
    D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, TILES: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: scores, running softmax, and the product with the members' V."""
    n = first + tl.arange(0, BLOCK)
    n64 = n.to(tl.int64)
    if MASKED:
        inside = n < stop
        k = tl.load(
            k_base[:, None] + n64[None, :] * stride_ks,
            mask=inside[None, :] & (d[:, None] < D), other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_base[None, :] + n64[:, None] * stride_vs,
            mask=inside[:, None] & in_value[None, :], other=0.0,
        )  # fmt: skip
    elif TILES:
        k = k_tiles.load([row, key, first, 0]).reshape(BLOCK, D).T
        v = v_tiles.load([row, first, v_column]).reshape(BLOCK, WIDTH)
    else:
        if D == DP:
            k = tl.load(k_base[:, None] + n64[None, :] * stride_ks)
        else:
            k = tl.load(k_base[:, None] + n64[None, :] * stride_ks, mask=d[:, None] < D, other=0.0)
        v = tl.load(v_base[None, :] + n64[:, None] * stride_vs, mask=in_value[None, :], other=0.0)
    s = tl.dot(q, k, input_precision=PRECISION) * scale
    s = _scores_base2(s, softcap, HAS_SOFTCAP)
    if MASKED:
        s = tl.where((n[None, :] <= position[:, None]) & inside[None, :], s, float("-inf"))
    if HAS_VALID:
        real = tl.load(valid_base + n, mask=n < stop, other=0) != 0
        s = tl.where(real[None, :], s, float("-inf"))
    new = tl.maximum(best, tl.max(s, axis=1))
    base = new
    if MASKED or HAS_VALID:
        base = tl.where(new == float("-inf"), 0.0, new)  # a row may have seen nothing yet
    p = tl.exp2(s - base[:, None])
    old = tl.exp2(best - base)
    weight = weight * old + tl.sum(p, axis=1)
    acc = acc * old[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return new, weight, acc


@triton.jit(do_not_specialize=["queries", "size", "chunks", "clusters", "tiles", "group", "pairs"])
def _prefill(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, length_ptr, valid_ptr,
    slot_ptr, key_ptr, head_ptr, value_ptr, out_ptr, lse_ptr,
    scale, softcap, queries, size, chunks, clusters, tiles, group, pairs,
    stride_qb, stride_qk, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_mb, stride_ob, stride_os, stride_oh,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_LENGTH: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LSE: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of members, ROWS queries."""
    # groups of chunks one after the other, so that tiles at work share K and V in the L2 cache;
    # within a group the last queries, which see the most keys, start first
    start = tl.program_id(0) // (group * tiles) * group
    width = tl.minimum(group, pairs - start)
    inside = tl.program_id(0) - start * tiles
    tile = tiles - 1 - inside // width
    pair = start + inside % width
    row = (pair // chunks).to(tl.int64)
    chunk = pair % chunks
    slot = tl.load(slot_ptr + row * chunks + chunk)
    if slot < 0:
        return
    length = tl.load(length_ptr + row).to(tl.int32) if HAS_LENGTH else size
    i = tile * ROWS + tl.arange(0, ROWS)
    position = length - queries + i
    d = tl.arange(0, DP)
    column = tl.arange(0, M * DVP)
    lane, dv = column // DVP, column % DVP
    key = tl.load(key_ptr + row * chunks + chunk).to(tl.int64)
    place = tl.load(value_ptr + (row * chunks + chunk) * M + lane).to(tl.int64)
    head = tl.load(head_ptr + (row * chunks + chunk) * M + lane)
    in_value = (place >= 0) & (dv < DV)
    i64 = i.to(tl.int64)
    q = tl.load(
        q_ptr + row * stride_qb + slot * stride_qk + i64[:, None] * stride_qs + d[None, :],
        mask=(i[:, None] < queries) & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    k_base = k_ptr + row * stride_kb + key * stride_kh + d
    v_base = v_ptr + row * stride_vb + place * stride_vh + dv
    # members of a chunk lie side by side in V; lanes without one read their neighbours, unused
    v_column = tl.load(value_ptr + (row * chunks + chunk) * M) * DV
    valid_base = valid_ptr + row * stride_mb if HAS_VALID else k_ptr

    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, M * DVP], dtype=tl.float32)
    stop = tl.minimum(length, length - queries + (tile + 1) * ROWS)
    # blocks that every query of the tile sees whole need no mask
    whole = tl.maximum(length - queries + tile * ROWS + 1, 0) // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        best, weight, acc = _tile(
            q, k_base, v_base, valid_base, first, stop, position, best, weight, acc, d, in_value,
            k_tiles, v_tiles, row.to(tl.int32), key.to(tl.int32), v_column,
            scale, softcap, stride_ks, stride_vs,
            D, DP, M * DVP, BLOCK, False, TILES, HAS_VALID, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    for first in range(whole, stop, BLOCK):
        best, weight, acc = _tile(
            q, k_base, v_base, valid_base, first, stop, position, best, weight, acc, d, in_value,
            k_tiles, v_tiles, row.to(tl.int32), key.to(tl.int32), v_column,
            scale, softcap, stride_ks, stride_vs,
            D, DP, M * DVP, BLOCK, True, TILES, HAS_VALID, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    seen = weight > 0
    acc = tl.where(seen[:, None], acc / tl.where(seen, weight, 1.0)[:, None], 0.0)
    target = out_ptr + row * stride_ob + i64[:, None] * stride_os + head[None, :] * stride_oh
    tl.store(
        target + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=(i[:, None] < queries) & in_value[None, :],
    )  # fmt: skip
    if HAS_LSE:
        lse = (best + tl.log2(tl.where(seen, weight, 1.0))) / LOG2_E
        lse = tl.where(seen, lse, float("-inf"))
        tl.store(lse_ptr + (row * clusters + slot) * queries + i, lse, mask=i < queries)


def prefill(
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
    rows: int,
    block: int,
    warps: int,
    stages: int,
    tiles: bool,
) -> None:
    """Write ``out [B, Q, H, Dv]`` for ``query [B, k, Q, D]``; see `ops.reference.attention`.

    ``tiles`` reads K and V with the tensor memory accelerator; `tileable` says if that can be.
    """
    batch, clusters, queries, dim = query.shape
    value_dim = value.shape[3]
    members = chunks.head.shape[2]
    k_tiles, v_tiles = key, value
    if tiles:
        groups, size = value.shape[1:3]
        k_tiles = TensorDescriptor(key, key.shape, key.stride(), [1, 1, block, dim])
        v_tiles = TensorDescriptor(
            value,
            [batch, size, groups * value_dim],
            [value.stride(0), value.stride(2), 1],
            [1, block, members * value_dim],
        )
    # float32 inputs are multiplied as such, not rounded to tf32
    precision = "ieee" if query.dtype.itemsize == 4 else "tf32"
    count, pairs = triton.cdiv(queries, rows), chunks.count * batch
    _prefill[(count * pairs,)](
        query, key, value, k_tiles, v_tiles, lengths, valid,
        chunks.slot, chunks.key, chunks.head, chunks.value, out, lse,
        scale, softcap or 1.0, queries, key.shape[2], chunks.count, clusters,
        count, group_of(count), pairs,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        0 if valid is None else valid.stride(0), *out.stride()[:3],
        D=dim, DP=padded(dim), DV=value_dim,
        DVP=padded(value_dim), M=members,
        ROWS=rows, BLOCK=block, HAS_LENGTH=lengths is not None, HAS_VALID=valid is not None,
        HAS_SOFTCAP=softcap is not None, HAS_LSE=lse is not None, TILES=tiles,
        PRECISION=precision,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def group_of(tiles: int) -> int:
    """How many chunks of so many tiles are worked on together: a GPU full of tiles."""
    return max(2, 128 // tiles)


def tileable(key: Tensor, value: Tensor, grouped: bool) -> bool:
    """Whether whole tiles can be fetched: V token-major in cluster order, everything aligned."""
    dims = (key.shape[3], value.shape[3])
    aligned = all(
        tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in (key, value)
    )
    powers = all(dim == padded(dim) for dim in dims)
    return not grouped and powers and aligned and value.stride(1) == value.shape[3]
