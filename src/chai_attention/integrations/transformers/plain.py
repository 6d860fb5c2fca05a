"""Attention as a model computes it without clusters, softcap included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Return ``[B, Q, H, Dv]``.

    Args:
        module: the attention module.
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``.
        value: ``[B, G, S, Dv]``.
        mask: ``[B, 1, Q, S]`` bool, or None for causal attention.
        scale: factor on the scores.
        softcap: cap on the scores, which torch's fused attention does not have.
        kwargs: what else the model's family passes on.
    """
    if softcap is None:
        out: Tensor = sdpa_attention_forward(
            module, query, key, value, mask, scaling=scale, **kwargs
        )[0]
        return out
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1).float() for x in (key, value))
    scores = softcap * torch.tanh(query.float() @ keys.mT * (scale / softcap))  # [B, H, Q, S]
    if mask is None:
        queries, size = scores.shape[-2:]
        mask = torch.ones(queries, size, dtype=torch.bool, device=query.device)
        mask = mask.tril(size - queries)
    probs = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1).nan_to_num(0.0)
    return (probs @ values).transpose(1, 2).to(value.dtype).contiguous()
