"""From a probe window to a membership on the GPU: two or three launches.

In multi-head attention, and where whole K/V heads are chosen, nothing is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.probe import Windows
from chai_attention.ops.triton import kmeans, kmedoids, launch_decode, launch_prefill, probe
from chai_attention.ops.triton.chunks import members_of
from chai_attention.ops.triton.decode import padded


def fits(query: Tensor, key: Tensor, value: Tensor | None = None) -> bool:
    """Whether the kernels take a window: up to 128 heads and tokens (64 with V), no float64."""
    return _takes(query.shape[1], query.shape[2], query, key, value)


def takes(query: Tensor, key: Tensor, windows: Windows, value: Tensor | None = None) -> bool:
    """The same of windows among packed tokens."""
    return _takes(query.shape[1], windows.tokens.shape[1], query, key, value)


def _takes(heads: int, window: int, query: Tensor, key: Tensor, value: Tensor | None) -> bool:
    most = probe.MAX_WINDOW if value is None else probe.MAX_VALUE_WINDOW
    states = (query, key) if value is None else (query, key, value)
    return (
        heads <= kmeans.MAX_HEADS
        and window <= most
        and query.dtype != torch.float64
        and all(each.stride(-1) == 1 for each in states)
    )


def cluster_window(
    query: Tensor, key: Tensor, clusters: int, *, tie: float, scale: float, softcap: float | None
) -> Membership:
    """Cluster the heads of every sequence by k-means over their maps (CHAI, section 3.3).

    The tables that decode and prefill read are made with it, for V of the same head size.

    Args:
        query: ``[B, H, W, D]`` of the probe window.
        key: ``[B, G, W, D]``.
        clusters: k.
        tie: see `clustering.kmeans`.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.
    """
    maps = probe.window_maps(query, key, scale=scale, softcap=softcap)
    members = _members(query, clusters)
    return _of_groups(kmeans.kmeans(maps, clusters, tie=tie, members=members), key)


def medoids_of_window(
    query: Tensor,
    key: Tensor,
    clusters: int,
    *,
    value: Tensor | None,
    static: Tensor | None,
    choices: Tensor | None,
    whole_groups: bool,
    tie: float,
    scale: float,
    softcap: float | None,
) -> Membership:
    """Cluster the heads of every sequence by k-medoids; see `ops.online.fused_medoids`."""
    maps = probe.window_maps(query, key, scale=scale, softcap=softcap)
    unit = query.shape[1] // key.shape[1] if whole_groups else 1
    found = kmedoids.kmedoids(
        maps if value is None else probe.output_distances(maps, value), clusters,
        from_maps=value is None, static=static, choices=choices, unit=unit, group=unit, tie=tie,
        members=_members(query, clusters),
    )  # fmt: skip
    return found if whole_groups else _of_groups(found, key)


def representatives(
    query: Tensor,
    key: Tensor,
    clusters: int,
    windows: Windows,
    *,
    value: Tensor | None,
    static: Tensor | None,
    choices: Tensor | None,
    whole_groups: bool,
    by_means: bool,
    tie: float,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Whom each head follows, for windows among packed tokens; see `ops.online`."""
    maps = probe.packed_maps(query, key, windows, scale=scale, softcap=softcap)
    if by_means:
        return kmeans.kmeans(maps, clusters, tie=tie, members=None).representatives
    unit = query.shape[1] // key.shape[1] if whole_groups else 1
    return kmedoids.kmedoids(
        maps if value is None else probe.output_distances(maps, value), clusters,
        from_maps=value is None, static=static, choices=choices, unit=unit, group=unit, tie=tie,
        members=None,
    ).representatives  # fmt: skip


def _members(query: Tensor, clusters: int) -> tuple[int, int]:
    """Members of a chunk in decode and in prefill."""
    heads, wide = query.shape[1], padded(query.shape[3])
    decode = members_of(heads, clusters, launch_decode.COLUMNS // wide)
    return decode, members_of(heads, clusters, launch_prefill.COLUMNS // wide)


def _of_groups(found: Membership, key: Tensor) -> Membership:
    """Count, with grouped queries, the K/V heads that single heads read: only the host can."""
    if key.shape[1] == found.heads:
        return found
    return Membership.from_representatives(
        found.representatives, found.clusters, kv_heads=key.shape[1]
    )
