"""The reference for long texts: some queries at a time, so that their scores stay few."""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import reference

SCORES = 1 << 28  # of all heads that exist at a time, unless one query has more: 1 GB


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
    """`ops.reference.attention`, whose results these are."""
    batch, queries, size = query.shape[0], query.shape[2], key.shape[2]
    step = queries_at_once(batch, membership.heads, size)
    if lengths is None:
        lengths = torch.full((batch,), size, device=key.device)
    outs, sums = [], []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        # a block's queries are the last ones of a shorter sequence
        out, lse = reference.attention(
            query[:, :, start:stop], key, value, membership, scale=scale,
            lengths=lengths - (queries - stop), valid=valid, softcap=softcap,
            return_lse=return_lse,
        )  # fmt: skip
        outs.append(out)
        sums.append(lse)
    known = [lse for lse in sums if lse is not None]
    return torch.cat(outs, 1), torch.cat(known, 2) if known else None


def queries_at_once(batch: int, heads: int, size: int) -> int:
    """How many queries' scores of ``size`` keys exist at a time."""
    return max(1, SCORES // (batch * heads * size))
