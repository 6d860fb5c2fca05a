"""From the Gram matrix of heads to a membership: what the online phase and calibration share."""

from __future__ import annotations

from torch import Tensor

from chai_attention.clustering.kmeans import (
    kmeans,
    squared_distances,
    tie_scale,
    working_precision,
)
from chai_attention.clustering.kv_aware import choose_kv_heads

SCORES, K_BYTES = "scores", "k-bytes"
TARGETS = (SCORES, K_BYTES)


def assign(gram: Tensor, clusters: int, kv_heads: int, target: str = SCORES) -> Tensor:
    """Return each head's representative.

    Args:
        gram: ``[B, H, H]``, inner products of the heads' features.
        clusters: k, the number of representatives. For "k-bytes" a multiple of H / G.
        kv_heads: G.
        target: "scores" clusters the heads with k-means and takes medoids (CHAI, 3.2 and 3.3);
            "k-bytes" chooses ``k / (H / G)`` K/V heads that keep their K (see `kv_aware`).

    Returns:
        ``[B, H]`` int64.

    Raises:
        ValueError: an unknown target, or a k that does not fit.
    """
    if target == SCORES:
        return kmeans(gram, clusters)
    if target != K_BYTES:
        raise ValueError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    group = gram.shape[-1] // kv_heads
    if clusters % group:
        raise ValueError(f"target k-bytes needs k to be a multiple of {group}, not {clusters}")
    gram = working_precision(gram)
    return choose_kv_heads(squared_distances(gram), kv_heads, clusters // group, tie_scale(gram))
