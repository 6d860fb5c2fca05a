"""The probe: scores of the first tokens of every head, from which memberships are made."""

from __future__ import annotations

import torch
from torch import Tensor


def window_gram(
    query: Tensor, key: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Inner products of all heads' causal attention maps over the probe window (CHAI, 3.3).

    Args:
        query: ``[B, H, W, D]`` of the first W tokens.
        key: ``[B, G, W, D]`` of the same tokens; G divides H.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.

    Returns:
        ``[B, H, H]`` float32, the Gram matrix of the flattened ``[W, W]`` probability maps.
    """
    batch, heads, window, dim = query.shape
    groups = key.shape[1]
    grouped = query.float().view(batch, groups, heads // groups, window, dim)
    scores = grouped @ key.float()[:, :, None].mT * scale  # [B, G, H / G, W, W]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    future = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    maps = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
    maps = maps.view(batch, heads, window * window)
    return maps @ maps.mT
