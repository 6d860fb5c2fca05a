"""Launches the Hopper prefill kernel: batches of equal length, packed sequences, pages."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from chai_attention.ops.triton.chunks import Chunks
from chai_attention.ops.triton.device import processors
from chai_attention.ops.triton.hopper import prefill_hopper
from chai_attention.ops.triton.hopper_work import plan
from chai_attention.ops.triton.prefill import group_of

ROWS = 64  # queries of a warpgroup; a tile has two
LEAST_QUERIES = 65  # that are worth tiles of 128
WIDTHS = (128, 256)  # columns of V a program can hold, of all its members
BLOCK = 64  # keys of a step
STAGES = 3  # blocks in shared memory


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
    tiles = triton.cdiv(queries, 2 * ROWS)
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
        box = min(box, page & -page)  # the largest power of two of which pages are made
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
        _tiles(query, [1, 1, ROWS, dim]),
        _tiles(key, [1, 1, box, columns]),
        _tiles(value, [1, 1, box, columns]),
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


def _tiles(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Describe a tensor to the tensor memory accelerator, in tiles of ``block``."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)
