"""Launches Triton's prefill: batches of equal length, packed sequences, their context in pages."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV, Probe
from chai_attention.ops.triton.checks import page_strides
from chai_attention.ops.triton.context_parts import count_of, join, memory_of
from chai_attention.ops.triton.decode import padded
from chai_attention.ops.triton.device import shared_bytes
from chai_attention.ops.triton.head_tiles import HeadTiles, head_tiles_of, heads_per_tile
from chai_attention.ops.triton.prefill import _prefill
from chai_attention.ops.triton.repeated import aligned, dtypes
from chai_attention.ops.triton.sizes import cdiv

logger = logging.getLogger("chai_attention")

COLUMNS = 256  # columns of a program's accumulator
LARGE_SHARED = 163 * 1024  # bytes of shared memory (A100) in which one load more is in flight


class Tile(NamedTuple):
    """What a program works on at a time.

    Attributes:
        rows: queries.
        block: keys of a step.
        warps: of a program.
        stages: loads in flight.
    """

    rows: int
    block: int
    warps: int
    stages: int


def heads_per_tile_for(query: Tensor, value: Tensor, member: Membership) -> int:
    """Members of a head tile, whose V a program has room for."""
    wide = padded(max(query.shape[-1], value.shape[-1]))
    return heads_per_tile(len(member.far_heads), member.clusters, COLUMNS // wide)


def tile_of(query: Tensor, value: Tensor, members: int, rows: int) -> Tile:
    """Choose the tile of ``rows`` queries."""
    wide = padded(max(query.shape[-1], value.shape[-1]))
    # many GPUs have less than two thirds of the shared memory of those that serve large models
    stages = (3 if wide <= 128 else 2) - (shared_bytes(query.device) < LARGE_SHARED)
    return Tile(rows, block_of(query, members * wide), 8 if rows == 128 else 4, stages)


def rows_of(queries: PackedQueries) -> int:
    """Queries of a tile of packed ones; of few sizes, as a server has to compile each."""
    sizes = (16, 32) if queries.query.dtype == torch.float32 else (16, 64, 128)
    return next((size for size in sizes if queries.max_seqlen_q <= size), sizes[-1])


def dense_prefill(
    query: Tensor,
    kv: DenseKV,
    call: AttentionCall,
    head_tiles: HeadTiles,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Write ``out [B, Q, H, Dv]`` and ``lse [B, k, Q]`` for ``query [B, k, Q, D]``."""
    key, value, lengths, valid = kv.key, kv.value, kv.lengths, kv.valid
    batch, _, queries, dim = query.shape
    members, value_dim = head_tiles.members, value.shape[3]
    rows = 128 if queries > 64 and query.dtype != torch.float32 else 32
    tile = tile_of(query, value, members, rows)
    logger.debug("prefill kernel: %d members a program, tiles of %d queries", members, rows)
    tiles = query.is_cuda and tileable(key, value, call.membership.group_size > 1)
    k_tiles, v_tiles = key, value
    if tiles:
        groups, size = value.shape[1:3]
        k_tiles = TensorDescriptor(key, key.shape, key.stride(), [1, 1, tile.block, dim])
        v_tiles = TensorDescriptor(
            value,
            [batch, size, groups * value_dim],
            [value.stride(0), value.stride(2), 1],
            [1, tile.block, members * value_dim],
        )
    count, pairs = cdiv(queries, rows), head_tiles.count * batch
    _prefill[(count * pairs,)](
        query, key, value, k_tiles, v_tiles, lengths, valid, None, None, None,
        head_tiles.slot, head_tiles.slot, *head_tiles.tables[2:], out, lse,
        call.scale, call.softcap or 1.0, queries, key.shape[2], head_tiles.count,
        count, group_of(count), pairs, batch, 0, 1, 0,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        0 if valid is None else valid.stride(0), 0, 1, *out.stride()[:3],
        *((0, 0, 0) if lse is None else lse.stride()),
        RAGGED=False, PAGE=0, LIMITED=False, HAS_IDS=False, HAS_LENGTH=lengths is not None,
        HAS_VALID=valid is not None, TILES=tiles, SPLIT=False,
        **_constants(query, value, call, head_tiles, tile, lse),
    )  # fmt: skip


def packed_prefill(
    queries: PackedQueries,
    kv: PagedKV | PackedKV,
    call: AttentionCall,
    head_tiles: HeadTiles,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Write ``out [T, H, Dv]``, of any strides but the last, and ``lse [T, k]``."""
    query, value = queries.query, kv.value
    tile = tile_of(query, value, head_tiles.members, rows_of(queries))
    logger.debug(
        "packed prefill kernel%s: %d members a program, tiles of %d queries",
        ", paged" if isinstance(kv, PagedKV) else "",
        head_tiles.members,
        tile.rows,
    )
    lengths = kv.seq_lens if isinstance(kv, PagedKV) else None
    _launch_packed(queries, kv, call, head_tiles, tile, out, lse, lengths)


def probe_prefill(
    probe: Probe, queries: PackedQueries, lengths: Tensor | None, call: AttentionCall, out: Tensor
) -> None:
    """Overwrite the first tokens of sequences without context with full attention.

    ``queries`` are those of the step, and ``lengths [B]`` their sequences' if some have context.
    """
    query, key, value, end = probe
    member = call.membership
    head_tiles = _own_head_tiles(member.heads, member.kv_heads, query.device)
    first = PackedQueries(query, queries.query_start_loc, end)
    tile = Tile(min(32, rows_of(first)), 32, 4, 2)
    own = AttentionCall(member, call.scale, call.softcap)
    kv = PackedKV(key, value, natural_order=True)
    _launch_packed(first, kv, own, head_tiles, tile, out, None, lengths, limit=end)


def _launch_packed(
    queries: PackedQueries,
    kv: PagedKV | PackedKV,
    call: AttentionCall,
    head_tiles: HeadTiles,
    tile: Tile,
    out: Tensor,
    lse: Tensor | None,
    lengths: Tensor | None,
    limit: int | None = None,
) -> None:
    """Launch; with a ``limit`` only so many first tokens, of sequences without context."""
    query, key, value = queries.query, kv.key, kv.value
    (total, held, dim), value_dim, members = query.shape, value.shape[-1], head_tiles.members
    starts, ids = queries.query_start_loc, call.membership_ids
    batch = starts.shape[0] - 1
    k_tiles, v_tiles, tiles = key, value, False
    parts, target = 1, out
    if lse is None and limit is None:
        parts = count_of(queries, kv, call.membership, head_tiles, tile.rows)
    if parts > 1:
        target, lse = memory_of(parts, out, queries.shared)
    if isinstance(kv, PagedKV):
        page, table = key.shape[1], kv.block_table
        strides = *page_strides(key), *page_strides(value)
    else:
        page, table = 0, None
        strides = 0, key.stride(1), key.stride(0), 0, value.stride(1), value.stride(0)
        whole = query.is_cuda and not kv.natural_order and call.membership.group_size == 1
        tiles = whole and tileable(key.transpose(0, 1)[None], value.transpose(0, 1)[None], False)
    if tiles:
        groups, (step, head) = value.shape[1], key.stride()[:2]
        shape, value_shape = [1, key.shape[1], total, dim], [1, total, groups * value_dim]
        k_strides, v_strides = (
            [total * step, head, step, 1],
            [total * value.stride(0), value.stride(0), 1],
        )
        k_tiles = TensorDescriptor(key, shape, k_strides, [1, 1, tile.block, dim])
        v_tiles = TensorDescriptor(
            value, value_shape, v_strides, [1, tile.block, members * value_dim]
        )
    if limit is None:
        count = total // tile.rows + batch  # enough for any lengths of sequences
        programs, pairs = count * head_tiles.count * parts, head_tiles.count
    else:
        count, pairs = cdiv(limit, tile.rows), batch * head_tiles.count
        programs = count * pairs
    q_strides, out_strides = (0, *query.stride()[1::-1]), (0, *target.stride()[-3:-1])
    lse_strides = (0, 0, 0) if lse is None or parts > 1 else (0, lse.stride(1), lse.stride(0))
    is_limited, has_softcap = limit is not None, call.softcap is not None
    key_of_launch = (
        _launch_packed, tile, dim, value_dim, page, held, tiles, is_limited, has_softcap, parts > 1,
        q_strides, strides, out_strides, lse_strides,
        *dtypes(query, key, target, lse, lengths, starts, table, ids),
    )  # fmt: skip
    launch = head_tiles.launches.get(key_of_launch) or head_tiles.launches.keep(
        key_of_launch, _prefill, PAGE=page, RAGGED=True, LIMITED=is_limited,
        HAS_IDS=ids is not None, HAS_LENGTH=lengths is not None, HAS_VALID=False, TILES=tiles,
        SPLIT=parts > 1,
        **_constants(query, value, call, head_tiles, tile, lse),
    )  # fmt: skip
    launch(
        (programs, 1, 1), aligned(query, key, value, target, *(() if lse is None else (lse,))),
        query, key, value, k_tiles, v_tiles, lengths, None, starts, table, ids,
        head_tiles.slot, head_tiles.query if held == call.membership.heads else head_tiles.slot,
        *head_tiles.tables[2:], target, lse,
        float(call.scale), float(call.softcap or 1.0), 0, 0, head_tiles.count, count, 2, pairs,
        batch, limit or 0, parts, total, *q_strides, *strides,
        0, 0 if table is None else table.stride(0), head_tiles.stride, *out_strides, *lse_strides,
    )  # fmt: skip
    if parts > 1:
        assert lse is not None
        join(target, lse, starts, head_tiles, out)


def _constants(
    query: Tensor,
    value: Tensor,
    call: AttentionCall,
    head_tiles: HeadTiles,
    tile: Tile,
    lse: Tensor | None,
) -> dict[str, Any]:
    """What all launches of the kernel are compiled for."""
    dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        "D": dim, "DP": padded(dim), "DV": value_dim, "DVP": padded(value_dim),
        "M": head_tiles.members, "ROWS": tile.rows, "BLOCK": tile.block,
        "HAS_SOFTCAP": call.softcap is not None, "HAS_LSE": lse is not None,
        "PRECISION": precision_of(query), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


@cache
def _own_head_tiles(heads: int, kv_heads: int, device: torch.device) -> HeadTiles:
    """Every head by itself."""
    return head_tiles_of(Membership.identity(heads, kv_heads, device=device), 1)


def precision_of(query: Tensor) -> str:
    """float32 inputs are multiplied as such, not rounded to tf32."""
    return "ieee" if query.dtype.itemsize == 4 else "tf32"


def block_of(query: Tensor, columns: int) -> int:
    """Keys of one block of a program."""
    if query.dtype.itemsize == 4 or query.shape[-1] > 128:
        return 32
    return 64 if columns > 128 else 128


def group_of(tiles: int) -> int:
    """How many head tiles of so many tiles are worked on together: a GPU full of tiles."""
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
