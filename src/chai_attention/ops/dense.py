"""Attention without clusters by torch's fused implementation, for memberships of k = H."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.reference import visible


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
    """Causal attention of an identity membership; arguments as in `ops.reference.attention`.

    Raises:
        ValueError: heads are clustered, or ``softcap`` or ``return_lse`` is asked for.
    """
    if not membership.is_identity or softcap is not None or return_lse:
        raise ValueError("dense attention needs k = H, no softcap and no log-sum-exp")
    batch, _, queries, _ = query.shape
    size = key.shape[2]
    mask = None
    if valid is not None or lengths is not None or (1 < queries < size):
        mask = visible(batch, queries, size, lengths, valid, query.device)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and queries > 1,
        scale=scale,
        enable_gqa=membership.group_size > 1,
    ).transpose(1, 2)  # [B, Q, H, Dv]
    # a padded query sees no key at all, which the fused softmax answers with NaN
    return (out if valid is None else out.nan_to_num(0.0)), None
