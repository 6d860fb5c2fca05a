"""From a Gram matrix of heads to a membership, for calibration and online requests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chai_attention.clustering.kmeans import (
    TIE,
    kmeans,
    squared_distances,
    tie_scale,
    working_precision,
)
from chai_attention.clustering.kmedoids import kmedoids

SCORES, K_BYTES = "scores", "k-bytes"
TARGETS = (SCORES, K_BYTES)


def assign(gram: Tensor, clusters: int, kv_heads: int, target: str = SCORES) -> Tensor:
    """Return each head's representative.

    Args:
        gram: ``[B, H, H]``, inner products of the heads' features.
        clusters: k, the number of representatives. For "k-bytes" a multiple of H / G.
        kv_heads: G.
        target: "scores" clusters the heads with k-means and takes medoids (CHAI, 3.2 and 3.3);
            "k-bytes" chooses ``k / (H / G)`` K/V heads that keep their K (see `kmedoids`).

    Returns:
        ``[B, H]`` int64.

    Raises:
        ValueError: an unknown target, or a k that does not fit.
    """
    if target == SCORES:
        return kmeans(gram, clusters)
    gram = working_precision(gram)
    return _by_cost(squared_distances(gram), clusters, kv_heads, target, tie_scale(gram))


def assign_by_cost(cost: Tensor, clusters: int, kv_heads: int, target: str = SCORES) -> Tensor:
    """Return each head's representative, by k-medoids on a cost that need not be symmetric.

    Args:
        cost: ``[B, H, H]``, ``cost[b, h, r]`` of head h using the scores of head r.
        clusters: k, the number of representatives. For "k-bytes" a multiple of H / G.
        kv_heads: G.
        target: "scores" chooses heads, "k-bytes" whole K/V heads.

    Returns:
        ``[B, H]`` int64.

    Raises:
        ValueError: as `assign`.
    """
    cost = working_precision(cost)
    tie = TIE * cost.abs().amax((1, 2)).clamp_min(1e-30)
    return _by_cost(cost, clusters, kv_heads, target, tie)


def _by_cost(cost: Tensor, clusters: int, kv_heads: int, target: str, tie: Tensor) -> Tensor:
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    if target == SCORES:
        return kmedoids(cost, cost.shape[-1], clusters, tie)
    group = cost.shape[-1] // kv_heads
    if clusters % group:
        raise ValueError(f"target k-bytes needs k to be a multiple of {group}, not {clusters}")
    return kmedoids(cost, kv_heads, clusters // group, tie)


def on_ranks(table: Tensor, ranks: int, assign_one: Callable[[Tensor], Tensor]) -> Tensor:
    """Return each head's representative where every rank assigns its own heads.

    Args:
        table: ``[H, H]``, inner products or costs.
        ranks: that hold H / ranks neighbouring heads each.
        assign_one: called with the ``[H / ranks, H / ranks]`` part of one rank.

    Returns:
        ``[H]`` int64.
    """
    return torch.cat([first + assign_one(part) for first, part in rank_parts(table, ranks)])


def rank_parts(table: Tensor, ranks: int) -> list[tuple[int, Tensor]]:
    """Each rank's first head, and its part of an ``[H, H]`` table."""
    own = len(table) // ranks
    return [(i, table[i : i + own, i : i + own]) for i in range(0, len(table), own)]
