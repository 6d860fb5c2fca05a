"""From a probe window to a membership on the GPU: three launches, nothing read on the host."""

from __future__ import annotations

from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.triton import kmeans, probe, tables


def fits(heads: int, kv_heads: int, window: int) -> bool:
    """Whether the kernels take the shape: multi-head attention, up to 128 heads and tokens."""
    return heads == kv_heads and heads <= kmeans.MAX_HEADS and window <= probe.MAX_WINDOW


def cluster_window(
    query: Tensor, key: Tensor, clusters: int, *, tie: float, scale: float, softcap: float | None
) -> Membership:
    """Cluster the heads of every sequence by k-means over their maps (CHAI, section 3.3).

    Args:
        query: ``[B, H, W, D]`` of the probe window.
        key: ``[B, H, W, D]``.
        clusters: k.
        tie: see `clustering.kmeans`.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
    """
    maps = probe.window_maps(query, key, scale=scale, softcap=softcap)
    representatives = kmeans.kmeans(maps, clusters, tie=tie)
    made = tables.membership_tables(representatives, clusters)
    return Membership.from_tables(representatives, clusters, **made)
