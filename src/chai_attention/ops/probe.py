"""The probe: scores of the first tokens of every head, from which memberships are made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """Probe windows among packed tokens.

    Attributes:
        tokens: ``[B, W]`` int64, each window's.
        real: ``[B]`` int32, how many of them there are; behind them stands any token.
        heads: ``[n]`` int64, the query heads to cluster; None for all. With grouped queries they
            are whole K/V heads'.
    """

    tokens: Tensor
    real: Tensor
    heads: Tensor | None = None


def window_gram(
    query: Tensor, key: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Inner products of all heads' causal attention maps over the probe window (CHAI, 3.3).

    Args:
        query: ``[B, H, W, D]`` of the first W tokens.
        key: ``[B, G, W, D]`` of the same tokens; G divides H.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.

    Returns:
        ``[B, H, H]`` float32, the Gram matrix of the flattened ``[W, W]`` probability maps.
    """
    maps = _window_maps(query, key, scale, softcap).flatten(2)
    return maps @ maps.mT


def window_output_distances(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """How much every head's output in the probe window would change with another's maps.

    Args:
        query: ``[B, H, W, D]`` of the first W tokens.
        key: ``[B, G, W, D]`` of the same tokens.
        value: ``[B, G, W, Dv]`` of the same tokens, in the natural order of heads.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.

    Returns:
        ``[B, H, H]`` float32, ``sum |(P_r - P_h) V_h|^2`` for head h (row) and r (column).
    """
    maps = _window_maps(query, key, scale, softcap)  # [B, H, W, W]
    batch, heads, window, _ = maps.shape
    group = heads // value.shape[1]
    values = value.float().repeat_interleave(group, dim=1)  # [B, H, W, Dv]
    # all heads' V side by side: one product per map gives its output for every head
    columns = values.transpose(1, 2).reshape(batch, 1, window, -1)  # [B, 1, W, H * Dv]
    outputs = (maps @ columns).view(batch, heads, window, heads, -1)  # [B, r, W, h, Dv]
    own = (maps @ values).transpose(1, 2)  # [B, W, h, Dv]
    return (outputs - own[:, None]).square().sum((2, 4)).mT


def _window_maps(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Causal attention probabilities within the window: ``[B, H, W, W]`` float32."""
    batch, heads, window, dim = query.shape
    groups = key.shape[1]
    grouped = query.float().view(batch, groups, heads // groups, window, dim)
    scores = grouped @ key.float()[:, :, None].mT * scale  # [B, G, H / G, W, W]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    future = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    maps = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
    return maps.view(batch, heads, window, window)
