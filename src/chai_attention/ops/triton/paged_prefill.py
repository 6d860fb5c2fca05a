"""Launches prefill of packed sequences: their context in pages, or none."""

from __future__ import annotations

import dataclasses
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from chai_attention.membership import Membership
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.paged_prefill import Probe
from chai_attention.ops.triton.checks import check
from chai_attention.ops.triton.chunks import Chunks, chunks_of, members_of
from chai_attention.ops.triton.decode import padded
from chai_attention.ops.triton.device import capability
from chai_attention.ops.triton.packed_window import prefill_packed_window
from chai_attention.ops.triton.prefill import (
    COLUMNS,
    _prefill,
    block_of,
    precision_of,
    tileable,
)
from chai_attention.ops.triton.sizes import cdiv

logger = logging.getLogger("chai_attention")


def paged_prefill(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    membership: Membership,
    out: Tensor,
    *,
    query_starts: Tensor,
    lengths: Tensor,
    most_queries: int,
    scale: float,
    softcap: float | None = None,
    rows: Tensor | None = None,
    probe: Probe | None = None,
    near: NearPages | None = None,
    offset: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | None:
    """`ops.paged_prefill.paged_prefill` into ``out``; returns the log-sum-exp or None."""
    lse = None
    if near is not None:
        _run_window(
            query, key_pages, value_pages, membership, out, query_starts, most_queries,
            near=near, recent=near.recent, sinks=near.sinks, offset=offset, table=block_table,
            lengths=lengths, rows=rows, scale=scale, softcap=softcap,
        )  # fmt: skip
    else:
        lse = _run(
            query, key_pages, value_pages, membership, out, query_starts, most_queries,
            return_lse=return_lse, table=block_table, lengths=lengths, rows=rows, scale=scale,
            softcap=softcap,
        )  # fmt: skip
    if probe is not None:
        _run_probe(probe, membership, out, query_starts, lengths, scale=scale, softcap=softcap)
    return lse


def varlen_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    out: Tensor,
    *,
    query_starts: Tensor,
    most_queries: int,
    scale: float,
    softcap: float | None = None,
    rows: Tensor | None = None,
    natural_order: bool = False,
    probe: Probe | None = None,
    recent: int = 0,
    sinks: int = 0,
    offset: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | None:
    """`ops.paged_prefill.varlen_prefill` into ``out``; returns the log-sum-exp or None."""
    lse = None
    if recent:
        _run_window(
            query, key, value, membership, out, query_starts, most_queries, recent=recent,
            sinks=sinks, offset=offset, rows=rows, scale=scale, softcap=softcap,
        )  # fmt: skip
    else:
        lse = _run(
            query, key, value, membership, out, query_starts, most_queries,
            return_lse=return_lse, rows=rows, natural_order=natural_order, scale=scale,
            softcap=softcap,
        )  # fmt: skip
    if probe is not None:
        _run_probe(probe, membership, out, query_starts, None, scale=scale, softcap=softcap)
    return lse


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    out: Tensor,
    query_starts: Tensor,
    most_queries: int,
    *,
    return_lse: bool,
    natural_order: bool = False,
    **options: Any,
) -> Tensor | None:
    """Choose the kernel and its tiles and launch it."""
    paged = options.get("table") is not None
    check(query, out, *(() if paged else (key, value)), pages=(key, value) if paged else ())
    lse = None
    if return_lse:
        shape = (query.shape[0], membership.clusters)
        lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    if not query.shape[0]:
        return lse
    wide = padded(max(query.shape[-1], value.shape[-1]))
    members = members_of(membership.heads, membership.clusters, COLUMNS // wide)
    chunks = (
        natural_chunks(membership, members) if natural_order else chunks_of(membership, members)
    )
    every_head = query.shape[1] == membership.heads
    softcap = options.pop("softcap")
    if softcap is None and capability(query.device)[0] == 9:
        from chai_attention.ops.triton import launch_hopper

        if most_queries >= launch_hopper.LEAST_QUERIES and launch_hopper.fits(
            query, key, value, members
        ):
            logger.debug("packed Hopper prefill kernel: %d members a program", members)
            launch_hopper.prefill_packed(
                query, key, value, chunks, out, lse, query_starts, every_head=every_head, **options
            )
            return lse
    rows = _rows_of(query, most_queries)
    logger.debug(
        "packed prefill kernel%s: %d members a program, tiles of %d queries",
        ", paged" if paged else "",
        members,
        rows,
    )
    whole = not natural_order and membership.group_size == 1
    prefill_packed(
        query, key, value, chunks, out, lse, query_starts,
        every_head=every_head, softcap=softcap, rows_of_tile=rows,
        block=block_of(query, members * wide), warps=8 if rows == 128 else 4,
        stages=3 if wide <= 128 else 2,
        tiles=query.is_cuda and not paged and _tileable(key, value, whole),
        **options,
    )  # fmt: skip
    return lse


def _run_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    out: Tensor,
    query_starts: Tensor,
    most_queries: int,
    *,
    near: NearPages | None = None,
    **options: Any,
) -> None:
    """The same with an exact window; K and V without pages are in their natural order."""
    pages = (key, value) if near is None else (key, value, near.key, near.value)
    check(query, out, *(pages if near is None else ()), pages=() if near is None else pages)
    if not query.shape[0]:
        return
    wide = padded(max(query.shape[-1], value.shape[-1]))
    # a program holds the sums of one member beside those of all
    members = min(2, members_of(len(membership.far_heads), membership.clusters, COLUMNS // wide))
    softcap, sinks = options["softcap"], options["sinks"]
    places = None if near is None else (membership.key_place, membership.value_place)
    kept = (membership.kept_keys, membership.kept_values)
    if softcap is None and capability(query.device)[0] == 9:
        from chai_attention.ops.triton import launch_hopper, launch_window

        both = min(2, max(members, min(launch_hopper.WIDTHS) // query.shape[-1]))
        rest = {name: options[name] for name in ("offset", "scale", "rows")}
        if near is not None and places is not None:
            if launch_window.fits_pages(query, key, value, near, both, most_queries):
                logger.debug(
                    "packed Hopper prefill kernel with a window, paged: %d members a program", both
                )
                launch_window.prefill_paged_window(
                    query, key, value, chunks_of(membership, both), places, kept,
                    membership.kv_heads, out, query_starts, near=near, table=options["table"],
                    lengths=options["lengths"], **rest,
                )  # fmt: skip
                return
        elif (
            most_queries >= launch_hopper.LEAST_QUERIES
            and sinks <= launch_hopper.SINKS
            and launch_hopper.fits(query, key, value, both)
        ):
            logger.debug("packed Hopper prefill kernel with a window: %d members a program", both)
            launch_hopper.prefill_packed_window(
                query, key, value, natural_chunks(membership, both), out, query_starts,
                recent=options["recent"], sinks=sinks, **rest,
            )  # fmt: skip
            return
    chunks = (natural_chunks if near is None else chunks_of)(membership, members)
    rows = _rows_of(query, most_queries)
    logger.debug(
        "packed prefill kernel with a window%s: %d members a program, tiles of %d queries",
        "" if near is None else ", paged",
        members,
        rows,
    )
    prefill_packed_window(
        query, key, value, chunks, places, kept, membership.kv_heads, out, query_starts,
        near=near, rows_of_tile=rows, block=block_of(query, members * wide),
        warps=8 if rows == 128 else 4, stages=3 if wide <= 128 else 2,
        **options,
    )  # fmt: skip


def _run_probe(
    probe: Probe,
    membership: Membership,
    out: Tensor,
    query_starts: Tensor,
    lengths: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Overwrite the first tokens of sequences without context with full attention."""
    query, key, value, end = probe
    check(query, key, value, out)
    if not query.shape[0]:
        return
    prefill_packed(
        query, key, value, _own_chunks(membership.heads, membership.kv_heads, query.device), out,
        None, query_starts, every_head=True, lengths=lengths, limit=end, scale=scale,
        softcap=softcap, rows_of_tile=min(32, _rows_of(query, end)), block=32, warps=4, stages=2,
        tiles=False,
    )  # fmt: skip


def prefill_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunks: Chunks,
    out: Tensor,
    lse: Tensor | None,
    query_starts: Tensor,
    *,
    every_head: bool,
    scale: float,
    softcap: float | None = None,
    table: Tensor | None = None,
    lengths: Tensor | None = None,
    rows: Tensor | None = None,
    limit: int | None = None,
    rows_of_tile: int,
    block: int,
    warps: int,
    stages: int,
    tiles: bool,
) -> None:
    """Write ``out [T, H, Dv]`` and ``lse [T, k]``.

    Args:
        query: ``[T, k or H, D]``.
        key: ``[T, kept, D]``, or pages ``[P, N, kept, D]`` if there is a ``table``.
        value: ``[T, G, Dv]``, or pages ``[P, N, G, Dv]``.
        chunks: the work; of one row for all sequences, of B rows, or of any number with ``rows``.
        out: any strides but the last.
        lse: float32 or None.
        query_starts: ``[B + 1]`` int32.
        every_head: whether ``query`` holds all heads in their natural order.
        scale: factor on the scores.
        softcap: as in the reference.
        table: ``[B, max_pages]`` int32, the block table.
        lengths: ``[B]`` int32 keys of each sequence; None for as many as queries.
        rows: ``[B]`` int32, row of the chunks' tables of each sequence.
        limit: attend with the first so many tokens of sequences without context only.
        rows_of_tile: queries of a program.
        block: keys of a step.
        warps: of a program.
        stages: loads in flight.
        tiles: read K and V with the tensor memory accelerator (without a table; `_tileable`).
    """
    total, _, dim = query.shape
    value_dim, members = value.shape[-1], chunks.head.shape[2]
    batch = query_starts.shape[0] - 1
    if table is None:
        page = 0
        strides = [0, key.stride(1), key.stride(0), 0, value.stride(1), value.stride(0)]
    else:
        page = key.shape[1]
        strides = [x.stride(axis) for x in (key, value) for axis in (0, 2, 1)]
    k_tiles, v_tiles = key, value
    if tiles:
        groups, (step, head) = value.shape[1], key.stride()[:2]
        k_tiles = TensorDescriptor(
            key, [1, key.shape[1], total, dim], [total * step, head, step, 1], [1, 1, block, dim]
        )
        v_tiles = TensorDescriptor(
            value,
            [1, total, groups * value_dim],
            [total * value.stride(0), value.stride(0), 1],
            [1, block, members * value_dim],
        )
    if limit is None:
        count = total // rows_of_tile + batch  # enough for any lengths of sequences
        programs, pairs = count * chunks.count, chunks.count
    else:
        count = cdiv(limit, rows_of_tile)
        pairs = batch * chunks.count
        programs = count * pairs
    _prefill[(programs,)](
        query, key, value, k_tiles, v_tiles, lengths, None, query_starts, table, rows,
        chunks.slot, chunks.query if every_head else chunks.slot, chunks.key, chunks.head,
        chunks.value, out, lse,
        scale, softcap or 1.0, 0, 0, chunks.count, count, 2, pairs, batch, limit or 0,
        0, query.stride(1), query.stride(0), *strides,
        0, 0 if table is None else table.stride(0), 0 if chunks.slot.shape[0] == 1 else 1,
        0, out.stride(0), out.stride(1),
        *((0, 0, 0) if lse is None else (0, lse.stride(1), lse.stride(0))),
        D=dim, DP=padded(dim), DV=value_dim, DVP=padded(value_dim), M=members,
        ROWS=rows_of_tile, BLOCK=block, PAGE=page, RAGGED=True,
        LIMITED=limit is not None, HAS_ROWS=rows is not None, HAS_LENGTH=lengths is not None,
        HAS_VALID=False, HAS_SOFTCAP=softcap is not None, HAS_LSE=lse is not None, TILES=tiles,
        PRECISION=precision_of(query), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def natural_chunks(membership: Membership, members: int) -> Chunks:
    """`chunks_of`, but for K and V of all K/V heads in their natural order."""
    return membership.derive(_deal_natural, members)


def _deal_natural(membership: Membership, members: int) -> Chunks:
    chunks, group = chunks_of(membership, members), membership.group_size
    return dataclasses.replace(
        chunks,
        key=torch.div(chunks.query, group, rounding_mode="floor"),  # -1 stays -1
        value=torch.div(chunks.head, group, rounding_mode="floor"),
    )


@cache
def _own_chunks(heads: int, kv_heads: int, device: torch.device) -> Chunks:
    """Every head by itself."""
    return chunks_of(Membership.identity(heads, kv_heads, device=device), 1)


def _rows_of(query: Tensor, most_queries: int) -> int:
    """Queries of a tile; of few sizes, as each is a kernel that a server has to compile."""
    sizes = (16, 32) if query.dtype == torch.float32 else (16, 64, 128)
    return next((size for size in sizes if most_queries <= size), sizes[-1])


def _tileable(key: Tensor, value: Tensor, whole: bool) -> bool:
    """Whether whole tiles of packed K and V can be fetched."""
    return whole and tileable(key.transpose(0, 1)[None], value.transpose(0, 1)[None], False)
