"""The probe: scores of the first tokens of every head, from which memberships are made."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, eq=False)
class HeadClustering:
    """How heads are clustered in a probe window: by k-means over maps, or by k-medoids on costs.

    Attributes:
        clusters: k, of the heads that are clustered; with ``whole_groups`` a multiple of H / G.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.
        tie: costs this close, relative to the largest (of maps without static costs, to the
            largest norm of a head), count as equal.
        by_means: by k-means; the next three do not count then.
        static: ``[H, H]`` float32, added to the costs, which are then divided by their mean over
            pairs of different heads; None for the costs as they are.
        choices: ``[N, units]`` bool, all choices of units (heads, or K/V heads with
            ``whole_groups``) that there are, to try them all; None searches by swaps.
        whole_groups: choose K/V heads, whose query heads all keep their scores.
    """

    clusters: int
    scale: float
    softcap: float | None
    tie: float
    by_means: bool = False
    static: Tensor | None = None
    choices: Tensor | None = None
    whole_groups: bool = False


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
