"""k-medoids: which heads keep their scores, given the cost of using another head's.

The cost need not be symmetric. In grouped-query attention whole groups are chosen: clustering
query heads frees K only when no query head of a K/V head is a representative, which plain k-means
rarely brings about. So some K/V heads keep their K, all their query heads keep their own scores,
and every other query head uses its cheapest head among those. In multi-head attention every head
is a group of its own, and this is k-medoids.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from chai_attention.clustering.kmeans import lowest_argmin

MAX_CHOICES = 1000  # up to this many subsets are all tried


def kmedoids(cost: Tensor, kv_heads: int, kept: int, tie: Tensor) -> Tensor:
    """Choose which K/V heads keep their K, and who represents the heads of the others.

    The subset with the lowest sum of costs wins: all subsets are tried if there are at most
    ``MAX_CHOICES``, otherwise heads are added greedily and then swapped while that helps.

    Args:
        cost: ``[B, H, H]``, ``cost[b, h, r]`` of head h using the scores of head r.
        kv_heads: G, divides H; H lets every head be chosen by itself.
        kept: K/V heads that keep their K, between 1 and G.
        tie: ``[B]``, costs closer than this are equal; the lowest index wins.

    Returns:
        ``[B, H]`` int64, each head's representative.

    Raises:
        ValueError: ``kept`` out of range, or heads that do not split over the K/V heads.
    """
    batch, heads, _ = cost.shape
    if heads % kv_heads or not 1 <= kept <= kv_heads:
        raise ValueError(f"cannot keep {kept} of {kv_heads} K/V heads of {heads} heads")
    group = heads // kv_heads
    own = torch.arange(heads, device=cost.device)
    # a head of a kept K/V head uses its own scores, at no cost
    cost = cost.masked_fill(torch.eye(heads, dtype=torch.bool, device=cost.device), 0.0)
    nearest = cost.view(batch, heads, kv_heads, group).amin(-1)  # [B, H, G]
    subsets = choices(kv_heads, kept)  # [N, G] bool
    if subsets is not None:
        subsets = subsets.to(cost.device)
        # [B, H, N, G] to [B, N]
        total = nearest[:, :, None].masked_fill(~subsets, torch.inf).amin(-1).sum(1)
        chosen = subsets[lowest_argmin(total, tie)]  # [B, G]
    else:
        chosen = _swap(nearest, _greedy(nearest, kept, tie), tie)
    allowed = chosen.repeat_interleave(group, dim=1)  # [B, H]
    choice = lowest_argmin(
        cost.masked_fill(~allowed[:, None, :], torch.inf), tie[:, None].expand(batch, heads)
    )
    return torch.where(allowed, own, choice)


def _greedy(nearest: Tensor, kept: int, tie: Tensor) -> Tensor:
    """Add the K/V head that lowers the summed cost most, one after the other: ``[B, G]`` bool."""
    batch, heads, kv_heads = nearest.shape
    chosen = torch.zeros(batch, kv_heads, dtype=torch.bool, device=nearest.device)
    best = torch.full((batch, heads, 1), torch.inf, device=nearest.device, dtype=nearest.dtype)
    rows = torch.arange(batch, device=nearest.device)
    for _ in range(kept):
        total = torch.minimum(best, nearest).sum(1).masked_fill(chosen, torch.inf)  # [B, G]
        pick = lowest_argmin(total, tie)
        chosen[rows, pick] = True
        best = torch.minimum(best, nearest[rows, :, pick][:, :, None])
    return chosen


def _swap(nearest: Tensor, chosen: Tensor, tie: Tensor) -> Tensor:
    """Swap a chosen for another K/V head while it lowers the summed cost: ``[B, G]`` bool."""
    batch, _, kv_heads = nearest.shape
    rows = torch.arange(batch, device=nearest.device)
    others = ~torch.eye(kv_heads, dtype=torch.bool, device=nearest.device)
    for _ in range(kv_heads):
        # cheapest of the chosen heads but one, for every one: [B, H, G out]
        left = chosen[:, None, :] & others
        rest = nearest[:, :, None].masked_fill(~left[:, None], torch.inf).amin(-1)
        total = torch.minimum(rest[..., None], nearest[:, :, None]).sum(1)  # [B, G out, G in]
        total = total.masked_fill(~chosen[:, :, None] | chosen[:, None, :], torch.inf).flatten(1)
        swap = lowest_argmin(total, tie)
        now = nearest.masked_fill(~chosen[:, None], torch.inf).amin(-1).sum(1)
        better = total[rows, swap] < now - tie
        if nearest.device.type == "cpu" and not bool(better.any()):
            break
        out, into = swap // kv_heads, swap % kv_heads
        chosen = chosen.clone()
        chosen[rows, out] ^= better
        chosen[rows, into] |= better
    return chosen


def choices(size: int, count: int) -> Tensor | None:
    """Every subset of ``count`` of ``size``, ``[N, size]`` bool; None for more than MAX_CHOICES.

    On the CPU, in lexicographic order, and always the same tensor.
    """
    return _subsets(size, count) if comb(size, count) <= MAX_CHOICES else None


@lru_cache(maxsize=64)
def _subsets(size: int, count: int) -> Tensor:
    table = torch.zeros(comb(size, count), size, dtype=torch.bool)
    for row, members in enumerate(combinations(range(size), count)):
        table[row, list(members)] = True
    return table
