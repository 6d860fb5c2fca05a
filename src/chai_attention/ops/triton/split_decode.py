"""Decode in two launches: parts of the context, then their merge.

An exact recent window is a part, too, one for each head. Both kinds join by their log-sum-exp.
"""

from __future__ import annotations

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.ring import NearRing
from chai_attention.ops.triton.checks import by_line
from chai_attention.ops.triton.chunks import Chunks
from chai_attention.ops.triton.decode import LOG2_E, _line_of, padded
from chai_attention.ops.triton.decode_parts import _parts
from chai_attention.ops.triton.launch_hopper_decode import launch_parts
from chai_attention.ops.triton.near_decode import near_block
from chai_attention.ops.triton.sizes import cdiv, power_of_2


@triton.jit(do_not_specialize=["chunks", "streaming", "splits", "clusters"])
def _merge(
    acc_ptr, sum_ptr, slot_ptr, head_ptr, rows_ptr, out_ptr, lse_ptr, offset_ptr,
    chunks, streaming, splits, clusters, stride_ob, stride_oh, stride_t, stride_offset,
    DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_NEAR: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_LSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one chunk's member, and its nearest keys, and write its output.

    The first ``streaming`` chunks have nearest keys only. The columns of V may be dealt to several
    programs.
    """
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    lane, part_of = tl.program_id(1) % M, tl.program_id(1) // M
    line = _line_of(row, rows_ptr, stride_t, HAS_ROWS)
    head = tl.load(head_ptr + (line * chunks + chunk) * M + lane)
    if head < 0:
        return
    dv = part_of * COLUMNS + tl.arange(0, COLUMNS)
    if EARLY:
        gdc_wait()
    split = tl.arange(0, SPLITS)
    there = split < tl.where(chunk >= streaming, splits, 0)
    part = row * chunks + chunk
    sums = part * splits
    sets = part * splits
    if HAS_NEAR:
        sums += part * M
        sets += part
    best = tl.load(sum_ptr + (sums + split) * 2, mask=there, other=float("-inf"))
    weight = tl.load(sum_ptr + (sums + split) * 2 + 1, mask=there, other=0.0)
    if HAS_OFFSET:
        best += tl.load(offset_ptr + row * stride_offset + head) * LOG2_E
    top = tl.max(best, axis=0)
    if HAS_NEAR:
        near_best = tl.load(sum_ptr + (sums + splits + lane) * 2)
        near_weight = tl.load(sum_ptr + (sums + splits + lane) * 2 + 1)
        near_out = tl.load(acc_ptr + ((sets + splits) * M + lane) * DVP + dv)
        top = tl.maximum(top, near_best)
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen at all: zeros, not NaN
    factor = tl.exp2(best - base)
    total = tl.sum(weight * factor, axis=0)
    acc = tl.load(
        acc_ptr + (sets + split)[:, None] * (M * DVP) + lane * DVP + dv[None, :],
        mask=there[:, None] & (factor[:, None] > 0), other=0.0,
    )  # fmt: skip
    out = tl.sum(acc * factor[:, None], axis=0)
    if HAS_NEAR:
        share = tl.exp2(near_best - base)
        total += near_weight * share
        out += near_out * share
    out = tl.where(total > 0, out / tl.where(total > 0, total, 1.0), 0.0)
    target = out_ptr + row * stride_ob + head * stride_oh + dv
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=dv < DV)
    if HAS_LSE and tl.program_id(1) == 0:
        slot = tl.load(slot_ptr + line * chunks + chunk)
        lse = (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2_E
        tl.store(lse_ptr + row * clusters + slot, tl.where(total > 0, lse, float("-inf")))


class _Window(NamedTuple):
    """What `_parts` takes of a recent window, in its order.

    Attributes:
        tensors: ring or near pages of K, sinks of K, the same of V, positions of the sinks, and
            block table of the near pages; None for what there is not.
        strides: of row or page, head and token, of both rings or near pages; of the sinks; of
            their positions.
        sizes: w, R and the ring's shift.
        stride_table: of the block table.
        sinks: s.
        page: tokens of a near page; 0 for a ring.
    """

    tensors: tuple[Tensor | None, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, int, int]
    stride_table: int
    sinks: int
    page: int


def _window_of(near: NearPages | NearRing | None) -> _Window:
    if near is None:
        return _Window((None,) * 6, (0,) * 13, (0, 1, 0), 0, 0, 0)
    if isinstance(near, NearPages):
        table = by_line(near.block_table)
        of_pages = (x.stride(axis) for x in (near.key, near.value) for axis in (0, 2, 1))
        return _Window(
            (near.key, None, near.value, None, None, table), (*of_pages, *(0,) * 7),
            (near.recent, 1, 0), table.stride(0), near.sinks, near.page,
        )  # fmt: skip
    ring, first, positions = near.ring, near.sinks, by_line(near.sink_positions)
    value_ring, value_first = near.value_ring, near.value_sinks
    strides = (
        0 if memory is None else memory.stride(axis)
        for memory in (ring, value_ring, first, value_first)
        for axis in (0, 1, 2)
    )
    return _Window(
        (ring, first, value_ring, value_first, positions, None), (*strides, positions.stride(0)),
        (near.recent, near.size, near.shift), 0, first.shape[2], 0,
    )  # fmt: skip


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunks: Chunks,
    out: Tensor,
    lse: Tensor | None,
    *,
    clusters: int,
    kv_heads: int,
    scale: float,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    table: Tensor | None = None,
    rows: Tensor | None = None,
    near: NearPages | NearRing | None = None,
    offset: Tensor | None = None,
    key_place: Tensor | None = None,
    splits: int,
    block: int,
    warps: int,
    stages: int,
    lines: int = 1,
    early: bool,
    registers: int | None = None,
    merge_columns: int | None = None,
    tensor_cores: bool = False,
) -> None:
    """Write ``out [B, H, Dv]`` for ``query [B, k or H, D]``; see `ops.reference.attention`.

    Args:
        query: of the representatives in slot order, or of all heads in theirs.
        key: ``[B, kept, S, D]``, or pages ``[P, N, kept, D]`` if there is a ``table``.
        value: ``[B, kept values, S, Dv]``, or pages ``[P, N, kept values, Dv]``.
        chunks: the work; of one row for all sequences, of B rows, or of any number with ``rows``.
        out: any strides but the last.
        lse: ``[B, k]`` float32 or None; without ``near``.
        clusters: k.
        kv_heads: G.
        scale: factor on the scores.
        softcap: as in the reference.
        lengths: ``[B]`` int32 keys of each sequence; None for all S (without a table only).
        valid: ``[B, S]`` bool, False for padding.
        table: ``[B, max_pages]`` int32, the block table.
        rows: ``[B]`` int32, row of the chunks' tables of each sequence.
        near: exact recent window; needs a query of all heads, ``key_place``. Near pages go with a
            ``table``.
        offset: ``[B, H]`` float32, added to the far keys' log-sum-exp.
        key_place: ``[rows, G]`` int32, `Membership.key_place`.
        splits: parts of the context.
        block: keys of a step.
        warps: of a program.
        stages: loads in flight.
        lines: keys of a block whose sums are kept apart until the end.
        early: whether the merge may be launched while the last parts are written (Hopper and
            later).
        registers: of a thread, at most; None for what the compiler takes.
        merge_columns: columns of V of a merging program; None for all.
        tensor_cores: whether the Hopper kernel computes the parts, which `fits`; then of the seven
            before, only ``splits``, ``early`` and ``merge_columns`` count.
    """
    batch, _, dim = query.shape
    value_dim = value.shape[3]
    heads = out.shape[1]
    members = chunks.head.shape[2]
    wide = padded(value_dim)
    paged = table is not None
    page = key.shape[1] if paged else 0
    # strides of sequence or page, head, token
    order = (0, 2, 1) if paged else (0, 1, 2)
    key_strides = [key.stride(axis) for axis in order]
    value_strides = [value.stride(axis) for axis in order]
    kept, kept_values = key.shape[order[1]], value.shape[order[1]]
    size = 0 if paged else key.shape[2]
    every_head = query.shape[1] == heads
    stride_t = 0 if chunks.slot.shape[0] == 1 else 1
    window = _window_of(near)
    near_keys = 0
    if near is not None:
        near_keys = near_block(near.recent + window.sinks, max(padded(dim), wide), warps)
    lengths, valid, table = by_line(lengths), by_line(valid), by_line(table)
    rows, offset = by_line(rows), by_line(offset)
    # a window is one part more, with sums of its own for every member
    own = near is not None
    parts, device = (batch, chunks.count), query.device
    acc = torch.empty(*parts, splits + own, members * wide, dtype=torch.float32, device=device)
    sums = torch.empty(*parts, splits + own * members, 2, dtype=torch.float32, device=device)
    far_chunks = chunks.count - chunks.streaming
    near_programs = batch * chunks.count * members * own
    tables = chunks.query if every_head else chunks.slot, chunks.key, chunks.value, chunks.head
    if tensor_cores:
        assert table is not None
        assert lengths is not None
        assert not isinstance(near, NearRing)
        launch_parts(
            query, key, value, chunks, tables[0], acc, sums, splits=splits, scale=scale,
            softcap=softcap, lengths=lengths, table=table, rows=rows, near=near,
            key_place=key_place, kv_heads=kv_heads, every_head=heads,
        )  # fmt: skip
    else:
        _parts[(near_programs + far_chunks * splits * batch,)](
            query, key, value, lengths, valid, table, rows, *tables, acc, sums,
            *window.tensors, key_place,
            scale, softcap or 1.0, size, near_programs, chunks.count, chunks.streaming, splits,
            *window.sizes, kept, kept_values,
            query.stride(0), query.stride(1), *key_strides, *value_strides,
            0 if valid is None else valid.stride(0), 0 if table is None else table.stride(0),
            stride_t, window.stride_table, *window.strides,
            D=dim, DP=padded(dim), DV=value_dim, DVP=wide, M=members, BLOCK=block, PAGE=page,
            GROUP=heads // kv_heads, KV_HEADS=kv_heads, NEAR=near_keys,
            STEPS=cdiv(window.sizes[0] + window.sinks, max(1, near_keys)),
            NEAR_PAGE=window.page, SINKS=window.sinks,
            SINKS_P=power_of_2(max(1, window.sinks)), HAS_ROWS=rows is not None,
            HAS_LENGTH=lengths is not None, HAS_VALID=valid is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_VALUE_RING=isinstance(near, NearRing) and near.value_ring is not None,
            STAGES=stages, LINES=lines, EARLY=early, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    columns = min(wide, merge_columns or wide)
    _merge[(chunks.count, members * (wide // columns), batch)](
        acc, sums, chunks.slot, chunks.head, rows, out, lse, offset,
        chunks.count, chunks.streaming, splits, clusters,
        out.stride(0), out.stride(1), stride_t, 0 if offset is None else offset.stride(0),
        DV=value_dim, DVP=wide, M=members, COLUMNS=columns, SPLITS=power_of_2(splits),
        HAS_ROWS=rows is not None, HAS_NEAR=own, HAS_OFFSET=offset is not None,
        HAS_LSE=lse is not None, EARLY=early, num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
