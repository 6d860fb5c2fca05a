"""Online memberships by the GPU's kernels, where they take the shape."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from torch import Tensor

from chai_attention.membership import Membership

logger = logging.getLogger("chai_attention")


def fused_membership(
    query: Tensor, key: Tensor, clusters: int, *, tie: float, scale: float, softcap: float | None
) -> Membership | None:
    """Cluster heads by k-means over their maps of the probe window, in three launches.

    Args:
        query: ``[B, H, W, D]`` of the window.
        key: ``[B, G, W, D]`` of the window.
        clusters: k.
        tie: costs this close, relative to the largest norm of a head, count as equal.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.

    Returns:
        The membership, or None where there is no kernel: the same is then done in PyTorch
        (`window_gram`, `clustering.kmeans`), in hundreds of launches.
    """
    if query.device.type != "cuda" or find_spec("triton") is None:
        return None
    from chai_attention.ops.triton import online

    if not online.fits(query.shape[1], key.shape[1], query.shape[2]):
        return None
    logger.debug("probe and clustering kernels: %d clusters", clusters)
    return online.cluster_window(query, key, clusters, tie=tie, scale=scale, softcap=softcap)
