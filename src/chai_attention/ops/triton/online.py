"""From a probe window to a membership on the GPU: two launches, nothing read on the host."""

from __future__ import annotations

from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.triton import kmeans, launch_decode, prefill, probe
from chai_attention.ops.triton.chunks import members_of
from chai_attention.ops.triton.decode import padded


def fits(heads: int, kv_heads: int, window: int) -> bool:
    """Whether the kernels take the shape: multi-head attention, up to 128 heads and tokens."""
    return heads == kv_heads and heads <= kmeans.MAX_HEADS and window <= probe.MAX_WINDOW


def cluster_window(
    query: Tensor, key: Tensor, clusters: int, *, tie: float, scale: float, softcap: float | None
) -> Membership:
    """Cluster the heads of every sequence by k-means over their maps (CHAI, section 3.3).

    The tables that decode and prefill read are made with it, for V of the same head size.

    Args:
        query: ``[B, H, W, D]`` of the probe window.
        key: ``[B, H, W, D]``.
        clusters: k.
        tie: see `clustering.kmeans`.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
    """
    maps = probe.window_maps(query, key, scale=scale, softcap=softcap)
    heads, wide = query.shape[1], padded(query.shape[3])
    members = (
        members_of(heads, clusters, launch_decode.COLUMNS // wide),
        members_of(heads, clusters, prefill.COLUMNS // wide),
    )
    return kmeans.kmeans(maps, clusters, tie=tie, members=members)
