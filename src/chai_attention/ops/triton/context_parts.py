"""Few queries behind a long context: parts of the context attended to at the same time.

Prefill gives every tile of queries and every head tile a program. Some dozen new tokens, as in the
next turn of a chat, have one tile of queries, so that most processors would have no work while some
walk along the whole context. Here several programs share a head tile's context. Each keeps its
normalised sums and their log-sum-exp, by which `_join` weighs them: decode's way (Flash-Decoding).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.call import PackedKV, PackedQueries, PagedKV
from chai_attention.ops.triton.decode import LOG2_E, padded
from chai_attention.ops.triton.device import processors
from chai_attention.ops.triton.head_tiles import HeadTiles
from chai_attention.ops.triton.repeated import aligned, dtypes
from chai_attention.ops.triton.sizes import cdiv

MOST_QUERIES = 256  # of a sequence; more fill the processors, or nearly
MOST_PARTS = 16
LEAST_KEYS = 256  # of a part
HEADS = 4  # that a joining program works on
# Hopper's own kernel, of tiles of 128 queries, has no parts (168 behind 8,064, default recipe, on
# an H200: 179 us; here 154 us by two parts, 116 by three, 94 by five)
WORTH_PARTS = 3


def count_of(
    queries: PackedQueries,
    kv: PagedKV | PackedKV,
    member: Membership,
    head_tiles: HeadTiles,
    rows: int,
) -> int:
    """Into how many parts contexts are divided: as many as fill the processors.

    ``rows`` are queries of a tile.
    """
    if not isinstance(kv, PagedKV) or queries.max_seqlen_q > MOST_QUERIES:
        return 1
    used = head_tiles.far_of_a_row(member)
    if not head_tiles.exact:
        # clusters of any sizes need more than those of equal size, by half a head tile each or
        # nearly. Programs for which there is no processor cost more than they gain (default recipe,
        # 168 behind 8,064, 12 head tiles taken for 10, H200: 114 us by six parts, 94 by five)
        used += cdiv(member.clusters * (head_tiles.members - 1), 2 * head_tiles.members)
    tiles = (queries.query_start_loc.shape[0] - 1) * cdiv(queries.max_seqlen_q, rows)
    if not used or not tiles:  # all heads stream, or all tokens are behind the last sequence
        return 1
    # two programs on a processor read faster than one, where they share scores (40 behind 32,000,
    # 8 clusters, H200: 118 us by 16 parts, 161 by 8), and else not (8 K/V heads: 140 and 139)
    resident = 2 if head_tiles.members > 1 and rows <= 64 else 1
    wanted = resident * processors(queries.query.device) // (used * tiles)
    return max(1, min(wanted, kv.most_keys // LEAST_KEYS, MOST_PARTS))


def memory_of(
    parts: int, out: Tensor, shared: dict[Any, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """``[parts, T, H, Dv]`` and ``[parts, T, H]`` float32, for the results of parts.

    The same for all calls with the dictionary ``shared`` (`PackedQueries.shared`).
    """
    key = (memory_of, parts, out.shape)
    found: tuple[Tensor, Tensor] | None = None if shared is None else shared.get(key)
    if found is None:
        sums = torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)
        found = sums, sums.new_empty(sums.shape[:-1])
        if shared is not None:
            shared[key] = found
    return found


@triton.jit
def _part_of(begin, end, at_part, parts, BLOCK: tl.constexpr):
    """The blocks of one part, from and to which key; parts that find none left are empty."""
    per_part = tl.cdiv(tl.cdiv(end - begin, BLOCK), parts) * BLOCK
    first = tl.minimum(begin + at_part * per_part, end)
    return first, tl.minimum(first + per_part, end)


@triton.jit
def _lse_base2(best, weight):
    """Log-sum-exp of scores whose largest is ``best``; -inf where nothing was seen."""
    some = weight > 0
    return tl.where(some, best + tl.log2(tl.where(some, weight, 1.0)), float("-inf"))


@triton.jit
def _keep_part(
    acc, best, weight, head_ptr, offset_ptr, out_ptr, lse_ptr, token, there, stride_os, stride_oh,
    DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """Keep the sums ``acc [ROWS, M * DVP]`` of a head tile's members, normalised, and their lse.

    Of rows that have seen nothing, as all of streaming heads, the lse tells so.
    """
    column = tl.arange(0, M * DVP)
    head = tl.load(head_ptr + column // DVP).to(tl.int64)
    some = weight > 0
    tl.store(
        out_ptr + token[:, None] * stride_os + head[None, :] * stride_oh + column[None, :] % DVP,
        acc / tl.where(some, weight, 1.0)[:, None],
        mask=(there & some)[:, None] & (head >= 0)[None, :] & (column % DVP < DV)[None, :],
    )  # fmt: skip
    for lane in tl.static_range(0, M):
        own = tl.load(head_ptr + lane).to(tl.int64)
        if own >= 0:
            lse = _lse_base2(best, weight)
            if HAS_OFFSET:
                lse += tl.load(offset_ptr + own) * LOG2_E
            tl.store(lse_ptr + token * (stride_os // DV) + own, lse, mask=there)


@triton.jit(
    do_not_specialize=["parts", "total", "heads", "batch"],
    do_not_specialize_on_alignment=["start_ptr"],
)
def _join(
    sums_ptr, lse_ptr, out_ptr, start_ptr, parts, total, heads, batch, stride_os, stride_oh,
    DV: tl.constexpr, DVP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token, some heads: the mean of the parts' results, weighted by their lse."""
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(start_ptr + batch):  # behind the last sequence
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dv = tl.arange(0, DVP)
    at = token * heads + head
    best = tl.full([HEADS], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([HEADS], dtype=tl.float32)
    acc = tl.zeros([HEADS, DVP], dtype=tl.float32)
    for _ in range(0, parts):
        lse = tl.load(lse_ptr + at, mask=head < heads, other=float("-inf"))
        some = lse > float("-inf")  # of others nothing is there to read
        sums = tl.load(
            sums_ptr + at[:, None] * DV + dv[None, :],
            mask=some[:, None] & (dv < DV)[None, :], other=0.0,
        )  # fmt: skip
        new = tl.maximum(best, lse)
        base = tl.where(new == float("-inf"), 0.0, new)
        share, old = tl.exp2(lse - base), tl.exp2(best - base)
        weight = weight * old + share
        acc = acc * old[:, None] + sums * share[:, None]
        best = new
        at += total * heads
    result = tl.where((weight > 0)[:, None], acc / tl.where(weight > 0, weight, 1.0)[:, None], 0.0)
    tl.store(
        out_ptr + token * stride_os + head.to(tl.int64)[:, None] * stride_oh + dv[None, :],
        result.to(out_ptr.dtype.element_ty), mask=(head < heads)[:, None] & (dv < DV)[None, :],
    )  # fmt: skip


def join(
    sums: Tensor, lse: Tensor, query_start_loc: Tensor, head_tiles: HeadTiles, out: Tensor
) -> None:
    """Write ``out [T, H, Dv]`` from what all parts have left in `memory_of`."""
    parts, total, heads, dim = sums.shape
    strides = out.stride()[:2]
    key = (join, dim, strides, *dtypes(query_start_loc, out))
    launch = head_tiles.launches.get(key) or head_tiles.launches.keep(
        key, _join, DV=dim, DVP=padded(dim), HEADS=HEADS, num_warps=4
    )
    launch(
        (total, cdiv(heads, HEADS), 1), aligned(sums, lse, out),
        sums, lse, out, query_start_loc, parts, total, heads,
        query_start_loc.shape[0] - 1, *strides,
    )  # fmt: skip
