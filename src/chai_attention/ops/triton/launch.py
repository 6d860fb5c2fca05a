"""Chooses the kernel and its tile sizes for the shapes at hand."""

from __future__ import annotations

import logging
from typing import Any

import torch
import triton
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.triton import launch_decode
from chai_attention.ops.triton.checks import check
from chai_attention.ops.triton.chunks import chunks_of
from chai_attention.ops.triton.decode import padded
from chai_attention.ops.triton.device import capability
from chai_attention.ops.triton.prefill import prefill, tileable

logger = logging.getLogger("chai_attention")

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
    if query.shape[2] == 1:
        return launch_decode.attention(
            query, key, value, membership, scale=scale, lengths=lengths, valid=valid,
            softcap=softcap, return_lse=return_lse,
        )  # fmt: skip
    check(query, key, value)
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
