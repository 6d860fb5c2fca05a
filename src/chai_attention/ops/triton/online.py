"""From a probe window to a membership on the GPU: two or three launches.

In multi-head attention, and where whole K/V heads are chosen, nothing is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.probe import HeadClustering, Windows
from chai_attention.ops.triton import kmeans, kmedoids, launch_decode, launch_prefill, probe
from chai_attention.ops.triton.decode import padded
from chai_attention.ops.triton.head_tiles import heads_per_tile


def fits(
    query: Tensor, key: Tensor, value: Tensor | None = None, window: int | None = None
) -> bool:
    """Whether the kernels take a window: up to 128 heads and tokens (64 with V), no float64.

    With ``window`` tokens each, windows are among packed tokens.
    """
    most = probe.MAX_WINDOW if value is None else probe.MAX_VALUE_WINDOW
    states = (query, key) if value is None else (query, key, value)
    return (
        query.shape[1] <= kmeans.MAX_HEADS
        and (query.shape[2] if window is None else window) <= most
        and query.dtype != torch.float64
        and all(each.stride(-1) == 1 for each in states)
    )


def membership_of_window(
    query: Tensor, key: Tensor, value: Tensor | None, how: HeadClustering
) -> Membership:
    """`ops.online.fused_membership` where `fits`.

    The tables that decode and prefill read are made with it, for V of the same head size.
    """
    maps = probe.window_maps(query, key, scale=how.scale, softcap=how.softcap)
    group = query.shape[1] // key.shape[1]
    found = _cluster(maps, value, how, group, _members(query, how.clusters))
    if how.whole_groups or group == 1:
        return found
    # with grouped queries the K/V heads that single heads read are counted: only the host can
    return Membership.from_representatives(
        found.representatives, found.clusters, kv_heads=key.shape[1]
    )


def representatives(
    query: Tensor, key: Tensor, value: Tensor | None, windows: Windows, how: HeadClustering
) -> Tensor:
    """`ops.online.fused_representatives` where it `fits`."""
    maps = probe.packed_maps(query, key, windows, scale=how.scale, softcap=how.softcap)
    group = query.shape[1] // key.shape[1]
    return _cluster(maps, value, how, group, None).representatives


def _cluster(
    maps: Tensor,
    value: Tensor | None,
    how: HeadClustering,
    group: int,
    members: tuple[int, int] | None,
) -> Membership:
    """Cluster by maps ``[B, H, W * W]`` and V of the window, with tables for ``members``."""
    if how.by_means:
        return kmeans.kmeans(maps, how.clusters, tie=how.tie, members=members)
    unit = group if how.whole_groups else 1
    return kmedoids.kmedoids(
        maps if value is None else probe.output_distances(maps, value), how.clusters,
        from_maps=value is None, static=how.static, choices=how.choices, unit=unit, group=unit,
        tie=how.tie, members=members,
    )  # fmt: skip


def _members(query: Tensor, clusters: int) -> tuple[int, int]:
    """Members of a head tile in decode and in prefill."""
    heads, wide = query.shape[1], padded(query.shape[3])
    decode = heads_per_tile(heads, clusters, launch_decode.COLUMNS // wide)
    return decode, heads_per_tile(heads, clusters, launch_prefill.COLUMNS // wide)
