"""Chooses the kernel and its tile sizes for the shapes at hand."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.triton import launch_decode
from chai_attention.ops.triton.checks import check
from chai_attention.ops.triton.chunks import chunks_of, members_of
from chai_attention.ops.triton.decode import padded
from chai_attention.ops.triton.device import capability
from chai_attention.ops.triton.prefill import COLUMNS, block_of, prefill, tileable

logger = logging.getLogger("chai_attention")


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
    options: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "lengths": lengths, "valid": valid,
    }  # fmt: skip
    members = members_of(membership.heads, membership.clusters, COLUMNS // wide)
    chunks = chunks_of(membership, members)
    plain = lengths is None and valid is None and softcap is None and queries <= key.shape[2]
    if plain and capability(query.device)[0] == 9:
        from chai_attention.ops.triton import launch_hopper

        if queries >= launch_hopper.LEAST_QUERIES and launch_hopper.fits(
            query, key, value, members
        ):
            logger.debug("Hopper prefill kernel: %d members a program", members)
            launch_hopper.prefill(query, key, value, chunks, out, lse, scale=scale)
            return out, lse
    rows = 128 if queries > 64 and query.dtype != torch.float32 else 32
    logger.debug("prefill kernel: %d members a program, tiles of %d queries", members, rows)
    prefill(
        query, key, value, chunks, out, lse,
        rows=rows,
        block=block_of(query, members * wide),
        warps=8 if rows == 128 else 4,
        stages=3 if wide <= 128 else 2,
        tiles=query.is_cuda and tileable(key, value, membership.group_size > 1),
        **options,
    )  # fmt: skip
    return out, lse
