"""Online memberships by the GPU's kernels, where they take the shape.

`clustering` defines what they compute, `integrations` chooses; both functions return None where
there is no kernel, and the same is then done in PyTorch, in hundreds of launches.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.probe import Windows

logger = logging.getLogger("chai_attention")


def fused_membership(
    query: Tensor, key: Tensor, clusters: int, *, tie: float, scale: float, softcap: float | None
) -> Membership | None:
    """Cluster heads by k-means over their maps of the probe window, in two launches.

    Args:
        query: ``[B, H, W, D]`` of the window.
        key: ``[B, G, W, D]`` of the window.
        clusters: k.
        tie: costs this close, relative to the largest norm of a head, count as equal.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.

    Returns:
        The membership, or None where there is no kernel (`window_gram` and `clustering.assign`
        do the same). With grouped queries, the K/V heads it reads are counted on the host.
    """
    kernels = _kernels(query, key)
    if kernels is None:
        return None
    logger.debug("probe and k-means kernels: %d clusters", clusters)
    found: Membership = kernels.cluster_window(
        query, key, clusters, tie=tie, scale=scale, softcap=softcap
    )
    return found


def fused_medoids(
    query: Tensor,
    key: Tensor,
    clusters: int,
    *,
    value: Tensor | None = None,
    static: Tensor | None = None,
    choices: Tensor | None = None,
    whole_groups: bool = False,
    tie: float,
    scale: float,
    softcap: float | None,
) -> Membership | None:
    """Cluster heads by k-medoids on costs in the probe window, in two or three launches.

    Args:
        query: ``[B, H, W, D]`` of the window.
        key: ``[B, G, W, D]`` of the window.
        clusters: k; with ``whole_groups`` a multiple of H / G.
        value: ``[B, G, W, Dv]`` of the window: costs are `window_output_distances`. None: squared
            distances of maps.
        static: ``[H, H]`` float32, added to the costs, which are then divided by their mean over
            pairs of different heads; None for the costs as they are.
        choices: ``[N, units]`` bool, all choices of units (heads, or K/V heads with
            ``whole_groups``) that there are, to try them all; None searches by swaps.
        whole_groups: choose K/V heads, whose query heads all keep their scores.
        tie: costs this close, relative to the largest (of maps without static costs, to the
            largest norm), count as equal.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.

    Returns:
        The membership, or None where there is no kernel.
    """
    kernels = _kernels(query, key, value)
    if kernels is None:
        return None
    logger.debug("probe and k-medoids kernels: %d clusters", clusters)
    found: Membership = kernels.medoids_of_window(
        query, key, clusters, value=value, static=static, choices=choices,
        whole_groups=whole_groups, tie=tie, scale=scale, softcap=softcap,
    )  # fmt: skip
    return found


def fused_representatives(
    query: Tensor,
    key: Tensor,
    clusters: int,
    windows: Windows,
    *,
    value: Tensor | None = None,
    static: Tensor | None = None,
    choices: Tensor | None = None,
    whole_groups: bool = False,
    by_means: bool = False,
    tie: float,
    scale: float,
    softcap: float | None,
) -> Tensor | None:
    """Cluster heads in windows among packed tokens, in two or three launches for all of them.

    Args:
        query: ``[T, H, D]``.
        key: ``[T, G, D]``.
        clusters: k, of the heads that are clustered.
        windows: where.
        value: ``[B, G', W, Dv]`` of the windows and of the clustered heads' K/V heads, as
            `fused_medoids` takes it, as are the next three.
        static: ``[n, n]`` float32.
        choices: ``[N, units]`` bool.
        whole_groups: choose K/V heads.
        by_means: by k-means over maps, as `fused_membership`.
        tie: as in both.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.

    Returns:
        ``[B, n]`` int64, whom each of the clustered heads follows, by their numbers among
        themselves; None where there is no kernel.
    """
    if query.device.type != "cuda" or find_spec("triton") is None:
        return None
    from chai_attention.ops.triton import online

    if not online.takes(query, key, windows, value):
        return None
    found: Tensor = online.representatives(
        query, key, clusters, windows, value=value, static=static, choices=choices,
        whole_groups=whole_groups, by_means=by_means, tie=tie, scale=scale, softcap=softcap,
    )  # fmt: skip
    return found


def _kernels(query: Tensor, key: Tensor, value: Tensor | None = None) -> ModuleType | None:
    """The launchers, if they take the shape."""
    if query.device.type != "cuda" or find_spec("triton") is None:
        return None
    from chai_attention.ops.triton import online

    return online if online.fits(query, key, value) else None
