"""Attention without clusters by torch's fused implementation, for memberships of k = H."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from chai_attention.ops.call import AttentionCall, DenseKV
from chai_attention.ops.reference import visible


def torch_attention(query: Tensor, kv: DenseKV, call: AttentionCall) -> tuple[Tensor, None]:
    """Causal attention of an identity membership; see `dispatch.attention`.

    Raises:
        ValueError: heads are clustered, or softcap or log-sum-exp is asked for.
    """
    if not call.membership.is_identity or call.softcap is not None or call.return_lse:
        raise ValueError("dense attention needs k = H, no softcap and no log-sum-exp")
    batch, _, queries, _ = query.shape
    size, valid, lengths = kv.key.shape[2], kv.valid, kv.lengths
    mask = None
    if valid is not None or lengths is not None or (1 < queries < size):
        mask = visible(batch, queries, size, lengths, valid, query.device)
    out = F.scaled_dot_product_attention(
        query,
        kv.key,
        kv.value,
        attn_mask=mask,
        is_causal=mask is None and queries > 1,
        scale=call.scale,
        enable_gqa=call.membership.group_size > 1,
    ).transpose(1, 2)  # [B, Q, H, Dv]
    # a padded query sees no key at all, which the fused softmax answers with NaN
    return (out if valid is None else out.nan_to_num(0.0)), None
