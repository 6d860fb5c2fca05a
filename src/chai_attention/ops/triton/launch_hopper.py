"""Launches the Hopper prefill kernel: batches of equal length, packed sequences, pages."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from chai_attention.ops.near import NearKeys
from chai_attention.ops.triton.chunks import Chunks
from chai_attention.ops.triton.device import processors
from chai_attention.ops.triton.hopper import prefill_hopper
from chai_attention.ops.triton.hopper_near import SINKS_MOST
from chai_attention.ops.triton.hopper_window import prefill_window as _prefill_window
from chai_attention.ops.triton.hopper_work import plan
from chai_attention.ops.triton.prefill import group_of
from chai_attention.ops.triton.sizes import cdiv

ROWS = 64  # queries of a warpgroup; a tile has two
LEAST_QUERIES = 65  # that are worth tiles of 128
WIDTHS = (128, 256)  # columns of V a program can hold, of all its members
BLOCK = 64  # keys of a step
STAGES = 3  # blocks in shared memory
SINKS = SINKS_MOST.value  # sinks that a window can have


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunks: Chunks,
    out: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
) -> None:
    """Write ``out [B, Q, H, Dv]`` for ``query [B, k, Q, D]``; see `ops.reference.attention`."""
    batch, _, queries, _ = query.shape
    tiles = cdiv(queries, 2 * ROWS)
    work, count = chunks.used
    _launch(
        tiles * chunks.count * batch, query, key, value, BLOCK, chunks.slot, chunks, out,
        lse, out.stride(), (0, 0, 0) if lse is None else lse.stride(),
        torch.zeros(1, dtype=torch.int32, device=query.device),  # the next item of the list
        work, count, None, None, None, None,
        scale, queries, key.shape[2], chunks.count, tiles, group_of(tiles), batch,
        0, 0,
        RAGGED=False, PAGE=0, HAS_ROWS=False, HAS_LENGTH=False,
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
    table: Tensor | None = None,
    lengths: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Write ``out [T, H, Dv]``; arguments as in `paged_prefill.prefill_packed`."""
    batch, page, box = query_starts.shape[0] - 1, 0, BLOCK
    query = query.transpose(0, 1)[None]  # [1, heads, T, D]
    if table is None:
        key, value = (x.transpose(0, 1)[None] for x in (key, value))
    else:
        key, value = (x.transpose(1, 2) for x in (key, value))  # [P, heads, N, D]
        page = key.shape[2]
        box = box_of(page)
    _launch(
        (query.shape[2] // (2 * ROWS) + batch) * chunks.count, query, key, value, box,
        chunks.query if every_head else chunks.slot, chunks, out,
        lse, (0, *out.stride()), (0, 0, 0) if lse is None else (0, lse.stride(1), lse.stride(0)),
        None, plan(chunks, query_starts, rows, 2 * ROWS), None, query_starts, lengths, table, rows,
        scale, 0, 0, chunks.count, 0, 0, batch,
        0 if table is None else table.stride(0), 0 if chunks.slot.shape[0] == 1 else 1,
        RAGGED=True, PAGE=page, HAS_ROWS=rows is not None,
        HAS_LENGTH=lengths is not None,
    )  # fmt: skip


def prefill_window(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    chunks: Chunks,
    near: NearKeys,
    out: Tensor,
    *,
    scale: float,
    offset: Tensor | None,
    past: int,
    recent: int,
    sinks: int,
) -> None:
    """Write ``out [B, Q, H, Dv]`` of attention with an exact window; see `window.attention`.

    Args:
        query: ``[B, H, Q, D]``, all heads.
        key: ``[B, kept, S, D]``, the far keys alone; None if there are none.
        value: ``[B, kept values, S, D]``, of the same tokens.
        chunks: the work, streaming heads' too.
        near: K and V of the near keys.
        out: any strides but the last.
        scale: factor on the scores.
        offset: ``[B, H]`` float32 or None.
        past: tokens before the queries.
        recent: w.
        sinks: s, no more than `SINKS`.
    """
    batch, heads, queries, dim = query.shape
    tiles = cdiv(queries, 2 * ROWS)
    work, count = chunks.used
    band = near.key.shape[2] - sinks
    size = 0 if key is None else key.shape[2]
    if key is None or value is None:
        key, value = near  # described to the kernel, and not read
    box = [1, 1, BLOCK, dim]
    _prefill_window[(min(processors(query.device), tiles * chunks.count * batch),)](
        tiles_of(query, [1, 1, ROWS, dim]), tiles_of(key, box), tiles_of(value, box),
        tiles_of(near.key, box), tiles_of(near.value, box),
        torch.zeros(1, dtype=torch.int32, device=query.device),  # the next item of the list
        work, count, None, None,
        chunks.slot, chunks.query, chunks.key, chunks.head, chunks.value, offset, out,
        scale, queries, size, past, recent, _near_blocks(recent),
        sinks - (past + queries - band), chunks.count, chunks.streaming, tiles,
        max(group_of(tiles), min(4, 256 // tiles)), 0, 0,
        *out.stride()[:3], 0 if offset is None else offset.stride(0),
        ROWS=ROWS, BLOCK=BLOCK, D=dim, M=chunks.head.shape[2], STAGES=STAGES, SINKS=sinks,
        SHARED=heads // near.key.shape[1], RAGGED=False, HAS_ROWS=False,
        HAS_OFFSET=offset is not None, num_warps=4,
    )  # fmt: skip


def prefill_packed_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunks: Chunks,
    out: Tensor,
    query_starts: Tensor,
    *,
    recent: int,
    sinks: int,
    offset: Tensor | None,
    scale: float,
    rows: Tensor | None = None,
) -> None:
    """Write ``out [T, H, Dv]`` of packed prompts without context, with an exact window.

    Args:
        query: ``[T, H, D]``.
        key: ``[T, G, D]`` in natural order.
        value: ``[T, G, D]``, the same.
        chunks: the work, for K and V in natural order.
        out: any strides but the last.
        query_starts: ``[B + 1]`` int32.
        recent: w.
        sinks: s, no more than `SINKS`.
        offset: ``[B, H]`` float32 or None.
        scale: factor on the scores.
        rows: as in `paged_prefill.prefill_packed`.
    """
    batch, (total, heads, dim) = query_starts.shape[0] - 1, query.shape
    box = [1, 1, BLOCK, dim]
    groups = key.shape[1]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    k_tiles, v_tiles = tiles_of(key, box), tiles_of(value, box)
    programs = (total // (2 * ROWS) + batch) * chunks.count
    _prefill_window[(min(processors(query.device), programs),)](
        tiles_of(query, [1, 1, ROWS, dim]), k_tiles, v_tiles, k_tiles, v_tiles,
        None, plan(chunks, query_starts, rows, 2 * ROWS), None, query_starts, rows,
        chunks.slot, chunks.query, chunks.key, chunks.head, chunks.value, offset, out,
        scale, 0, 0, 0, recent, _near_blocks(recent), 0, chunks.count, chunks.streaming, 0, 0,
        batch, 0 if chunks.slot.shape[0] == 1 else 1,
        0, *out.stride()[:2], 0 if offset is None else offset.stride(0),
        ROWS=ROWS, BLOCK=BLOCK, D=dim, M=chunks.head.shape[2], STAGES=STAGES, SINKS=sinks,
        SHARED=heads // groups, RAGGED=True, HAS_ROWS=rows is not None,
        HAS_OFFSET=offset is not None, num_warps=4,
    )  # fmt: skip


def _near_blocks(recent: int) -> int:
    """Blocks of keys that a tile sees near; each half leaves one of them out."""
    return cdiv(ROWS - 1 + recent, BLOCK) + 1


def _launch(
    programs: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    box: int,
    heads: Tensor,
    chunks: Chunks,
    out: Tensor,
    lse: Tensor | None,
    out_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
    *arguments: Any,
    **constants: Any,
) -> None:
    """Launch with Q, K and V ``[rows, heads, tokens, D]`` as tiles of ``box`` tokens."""
    dim, members = query.shape[3], chunks.head.shape[2]
    # parts of a block have to be as wide as the swizzle
    columns = dim if box == BLOCK else 64
    lists, numbers = arguments[:7], arguments[7:]
    prefill_hopper[(min(processors(query.device), programs),)](
        tiles_of(query, [1, 1, ROWS, dim]),
        tiles_of(key, [1, 1, box, columns]),
        tiles_of(value, [1, 1, box, columns]),
        *lists, chunks.slot, heads, chunks.key, chunks.head, chunks.value, out, lse,
        *numbers, *out_strides[:3], *lse_strides,
        ROWS=ROWS, BLOCK=BLOCK, D=dim, M=members, STAGES=STAGES,
        HAS_LSE=lse is not None, num_warps=4, **constants,
    )  # fmt: skip


def fits(query: Tensor, key: Tensor, value: Tensor, members: int) -> bool:
    """Whether this kernel can run these tensors: head sizes 64 and 128, 16-bit, aligned."""
    dim = query.shape[-1]
    aligned = all(
        x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
        for x in (query, key, value)
    )
    return (
        query.dtype.itemsize == key.dtype.itemsize == 2
        and dim == value.shape[-1]
        and dim in (64, 128)
        and members * dim in WIDTHS
        and aligned
    )


def box_of(page: int) -> int:
    """Tokens that are fetched at a time: the largest power of two of which pages are made."""
    return min(BLOCK, page & -page)


def tiles_of(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Describe a tensor to the tensor memory accelerator, in tiles of ``block``."""
    layout = _layout(len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


@cache
def _layout(rank: int) -> gl.NVMMASharedLayout:
    """How tiles of 16-bit numbers lie in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)
