"""Chooses the kernel and its tile sizes for the shapes at hand."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.triton.chunks import chunks_of
from chai_attention.ops.triton.decode import decode, padded
from chai_attention.ops.triton.prefill import prefill, tileable

logger = logging.getLogger("chai_attention")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
DECODE_COLUMNS = 512  # numbers of V a decode program holds per key
DECODE_TILE = 16384  # numbers of V in one block of a decode program: measured best on an H100
PREFILL_COLUMNS = 256  # columns of a prefill program's accumulator
PROGRAMS_PER_PROCESSOR = 8  # what decode splits the context for
MIN_KEYS_PER_SPLIT = 64
MAX_SPLITS = 128


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
        splits = _splits(batch * chunks.count, key.shape[2], query.device)
        logger.debug("decode kernel: %d members a program, %d splits", members, splits)
        block = max(32, min(128, DECODE_TILE // (members * wide)))
        decode(
            query, key, value, chunks, out, lse,
            splits=splits, block=block, warps=2, stages=3, **options,
        )  # fmt: skip
        return out, lse
    members = min(most, max(1, PREFILL_COLUMNS // wide))
    chunks = chunks_of(membership, members)
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


def _splits(programs: int, size: int, device: torch.device) -> int:
    """How many parts the context is cut into so that every processor has work."""
    wanted = triton.cdiv(_processors(device) * PROGRAMS_PER_PROCESSOR, programs)
    return max(1, min(wanted, triton.cdiv(size, MIN_KEYS_PER_SPLIT), MAX_SPLITS))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
