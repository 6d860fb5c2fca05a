"""Launches Hopper prefill with an exact window over pages."""

from __future__ import annotations

from torch import Tensor

from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.triton.chunks import Chunks
from chai_attention.ops.triton.device import processors
from chai_attention.ops.triton.hopper_paged_window import prefill_paged_window as _kernel
from chai_attention.ops.triton.hopper_pages import BOX, COLUMNS
from chai_attention.ops.triton.hopper_work import plan
from chai_attention.ops.triton.launch_hopper import (
    BLOCK,
    LEAST_QUERIES,
    ROWS,
    SINKS,
    STAGES,
    box_of,
    fits,
    tiles_of,
)


def fits_pages(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    near: NearPages,
    members: int,
    most_queries: int,
) -> bool:
    """Whether the kernel takes these, and is worth it."""
    pages = [x for x in (key_pages, value_pages, near.key, near.value) if x.shape[2]]
    return (
        most_queries >= LEAST_QUERIES
        and near.sinks <= SINKS
        and key_pages.shape[1] % BOX.value == near.page % BOX.value == 0
        and all(fits(query, x, x, members) for x in pages)
    )


def prefill_paged_window(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    chunks: Chunks,
    places: tuple[Tensor, Tensor],
    kept: tuple[int, int],
    groups: int,
    out: Tensor,
    query_starts: Tensor,
    *,
    near: NearPages,
    table: Tensor,
    lengths: Tensor,
    offset: Tensor | None,
    scale: float,
    rows: Tensor | None = None,
) -> None:
    """Write ``out [T, H, Dv]`` of packed sequences behind their context in pages.

    Args:
        query: ``[T, H, D]``.
        key_pages: ``[P, N, kept, D]``; N and the near pages' are multiples of 16.
        value_pages: ``[P, N, kept values, D]``.
        chunks: the work, streaming heads' too.
        places: ``[B, G]`` places of K and of V of every K/V head, near ones behind kept ones.
        kept: numbers of K and of V heads in far pages.
        groups: G.
        out: any strides but the last.
        query_starts: ``[B + 1]`` int32.
        near: the near pages, of no more than `SINKS` sinks.
        table: ``[B, max_pages]`` int32, of the far pages.
        lengths: ``[B]`` int32 keys of each sequence.
        offset: ``[B, H]`` float32 or None.
        scale: factor on the scores.
        rows: as in `paged_prefill.prefill_packed`.
    """
    batch, (total, heads, dim) = query_starts.shape[0] - 1, query.shape
    pages = [x.transpose(1, 2) for x in (key_pages, value_pages, near.key, near.value)]
    some = next(x for x in pages if x.shape[1])
    # what has no heads is described to the kernel as something else, and not read
    far_key, far_value, near_key, near_value = (x if x.shape[1] else some for x in pages)
    size = box_of(key_pages.shape[1])
    # parts of a block have to be as wide as the swizzle
    box = [1, 1, size, dim if size == BLOCK else COLUMNS.value]
    little = [1, 1, BOX.value, COLUMNS.value]
    programs = (total // (2 * ROWS) + batch) * chunks.count
    _kernel[(min(processors(out.device), programs),)](
        tiles_of(query.transpose(0, 1)[None], [1, 1, ROWS, dim]),
        tiles_of(far_key, box), tiles_of(far_value, box),
        tiles_of(far_key, little), tiles_of(far_value, little),
        tiles_of(near_key, little), tiles_of(near_value, little),
        plan(chunks, query_starts, rows, 2 * ROWS), query_starts, lengths, table,
        near.block_table, rows, chunks.slot, chunks.query, chunks.key, chunks.head, chunks.value,
        *places, offset, out,
        scale, near.recent, chunks.count, chunks.streaming, batch, *kept,
        0 if chunks.slot.shape[0] == 1 else 1, table.stride(0), near.block_table.stride(0),
        *out.stride()[:2], 0 if offset is None else offset.stride(0),
        ROWS=ROWS, BLOCK=BLOCK, D=dim, M=chunks.head.shape[2], STAGES=STAGES, SINKS=near.sinks,
        SHARED=heads // groups, GROUPS=groups, PAGE=key_pages.shape[1], NEAR_PAGE=near.page,
        HAS_ROWS=rows is not None, HAS_OFFSET=offset is not None, num_warps=4,
    )  # fmt: skip
