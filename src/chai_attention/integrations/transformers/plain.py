"""A model's attention without clusters, softcap included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chai_attention.ops.reference_backend import queries_at_once


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
    (batch, heads, queries, _), size = query.shape, key.shape[2]
    step = queries_at_once(batch, heads, size)
    parts = []
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        seen = None if mask is None else mask[..., rows, :]
        if seen is None:
            seen = torch.ones(rows.stop - start, size, dtype=torch.bool, device=query.device)
            seen = seen.tril(size - queries + start)
        part = query[:, :, rows]
        if step < queries and torch.is_grad_enabled():  # else all blocks' scores would be kept
            attended = checkpoint(
                _capped, part, keys, values, seen, scale, softcap, use_reentrant=False
            )
        else:
            attended = _capped(part, keys, values, seen, scale, softcap)
        parts.append(attended)
    return torch.cat(parts, 2).transpose(1, 2).to(value.dtype).contiguous()


def _capped(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attention of some queries ``[B, H, R, D]``, float32, with a cap on the scores."""
    scores = softcap * torch.tanh(query.float() @ keys.mT * (scale / softcap))  # [B, H, R, S]
    probs = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0.0)
    return probs @ values
