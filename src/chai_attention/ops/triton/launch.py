"""Chooses the kernel and its tile sizes for the shapes at hand."""

from __future__ import annotations

import logging
from typing import Any

import torch
import triton
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.triton.chunks import chunks_of
from chai_attention.ops.triton.decode import decode, padded
from chai_attention.ops.triton.device import capability, processors
from chai_attention.ops.triton.prefill import prefill, tileable

logger = logging.getLogger("chai_attention")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# decode, measured on an H100: numbers of V per key and per block of keys a program holds, and how
# many programs a processor runs at a time, by the numbers per key
DECODE_COLUMNS = 1024
DECODE_TILE_BYTES = 2 * 16384
RESIDENT = {512: 3, 256: 4, 0: 6}
MIN_KEYS_PER_SPLIT = 64
MAX_SPLITS = 128
MAX_WAVES = 8
PREFILL_COLUMNS = 256  # columns of a prefill program's accumulator
HOPPER_QUERIES = 64  # more queries than this are worth the Hopper kernel's tiles of 128


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    *,
    scale: float,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention; arguments and results as in `ops.reference.attention`.

    Nothing is read on the host and the grid depends on shapes alone, so calls can be captured in
    CUDA graphs (after one call outside, which makes the tables of the membership).

    Raises:
        ValueError: a dtype or head size without a kernel, or strided head dimensions.
    """
    _check(query, key, value)
    batch, clusters, queries, dim = query.shape
    shape = (batch, queries, membership.heads, value.shape[3])
    out = torch.empty(shape, dtype=value.dtype, device=query.device)
    lse = None
    if return_lse:
        lse = torch.empty(batch, clusters, queries, dtype=torch.float32, device=query.device)
    wide = padded(max(dim, value.shape[3]))
    # lanes that no member fills are wasted, so chunks are no wider than clusters are on average
    most = triton.next_power_of_2(triton.cdiv(membership.heads, clusters))
    options: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "lengths": lengths, "valid": valid,
    }  # fmt: skip
    if queries == 1:
        members = min(most, max(1, DECODE_COLUMNS // wide))
        chunks = chunks_of(membership, members)
        columns = members * wide
        programs = batch * max(clusters, triton.cdiv(membership.heads, members))
        splits = _splits(programs, columns, key.shape[2], query.device)
        logger.debug("decode kernel: %d members a program, %d splits", members, splits)
        decode(
            query, key, value, chunks, out, lse,
            splits=splits,
            block=max(8, min(64, DECODE_TILE_BYTES // (columns * value.element_size()))),
            warps=4 if columns > 128 else 2,
            stages=2,
            early=capability(query.device) >= (9, 0),
            **options,
        )  # fmt: skip
        return out, lse
    members = min(most, max(1, PREFILL_COLUMNS // wide))
    chunks = chunks_of(membership, members)
    plain = lengths is None and valid is None and softcap is None
    if plain and queries > HOPPER_QUERIES and capability(query.device)[0] == 9:
        from chai_attention.ops.triton import hopper

        if hopper.fits(query, key, value, membership, members):
            logger.debug("Hopper prefill kernel: %d members a program", members)
            hopper.prefill(query, key, value, chunks, out, lse, scale=scale)
            return out, lse
    rows = 128 if queries > 64 and query.dtype != torch.float32 else 32
    logger.debug("prefill kernel: %d members a program, tiles of %d queries", members, rows)
    prefill(
        query, key, value, chunks, out, lse,
        rows=rows,
        block=_prefill_block(query, members * wide),
        warps=8 if rows == 128 else 4,
        stages=3 if wide <= 128 else 2,
        tiles=query.is_cuda and tileable(key, value, membership.group_size > 1),
        **options,
    )  # fmt: skip
    return out, lse


def _prefill_block(query: Tensor, columns: int) -> int:
    """Keys of one block of a prefill program."""
    if query.dtype == torch.float32 or query.shape[3] > 128:
        return 32
    return 64 if columns > 128 else 128


def _splits(programs: int, columns: int, size: int, device: torch.device) -> int:
    """How many parts the context is cut into, so that programs fill whole waves of processors.

    ``programs`` is an estimate: how many chunks of full clusters there are. A wave of all
    processors that is only begun costs as much time as a full one.
    """
    resident = next(count for least, count in RESIDENT.items() if columns >= least)
    slots = processors(device) * resident
    most = min(MAX_SPLITS, triton.cdiv(size, MIN_KEYS_PER_SPLIT))
    best, best_share = 1, 0.0
    for waves in range(1, MAX_WAVES + 1):
        splits = min(slots * waves // programs, most)
        share = programs * splits / (triton.cdiv(programs * splits, slots) * slots) if splits else 0
        if share > best_share:
            best, best_share = splits, share
        if share > 0.95:
            break
    return best


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse what the kernels cannot run."""
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"the kernels take float32, bfloat16 or float16, one for all, not {query.dtype}, "
            f"{key.dtype}, {value.dtype}"
        )
    dim = max(query.shape[3], value.shape[3])
    if dim > MAX_HEAD_DIM:
        raise ValueError(f"head size {dim} is more than the kernels' {MAX_HEAD_DIM}")
    if any(tensor.stride(3) != 1 for tensor in (query, key, value)):
        raise ValueError("the numbers of a head must be consecutive in memory")
