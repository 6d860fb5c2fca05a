"""Online memberships by GPU kernels, for shapes that they support.

`clustering` defines what they compute, `runtime.plan` chooses; both functions return None where
there is no kernel, and the same is then done in PyTorch, in hundreds of launches.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.probe import HeadClustering, Windows

logger = logging.getLogger("chai_attention")


def fused_membership(
    query: Tensor, key: Tensor, value: Tensor | None, how: HeadClustering
) -> Membership | None:
    """Cluster the heads of every sequence, in two or three launches.

    Args:
        query: ``[B, H, W, D]`` of the window.
        key: ``[B, G, W, D]`` of the window.
        value: ``[B, G, W, Dv]`` of the window: costs are `window_output_distances`. None: squared
            distances of maps.
        how: as it says.

    Returns:
        The membership, or None where there is no kernel. With grouped queries, the K/V heads that
        single heads read are counted on the host.
    """
    kernels = _kernels(query, key, value)
    if kernels is None:
        return None
    logger.debug("probe and clustering kernels: %d clusters", how.clusters)
    found: Membership = kernels.membership_of_window(query, key, value, how)
    return found


def fused_representatives(
    query: Tensor, key: Tensor, value: Tensor | None, windows: Windows, how: HeadClustering
) -> Tensor | None:
    """The same in windows among packed tokens, for all of them at once.

    Args:
        query: ``[T, H, D]``.
        key: ``[T, G, D]``.
        value: ``[B, G', W, Dv]`` of the windows and of the clustered heads' K/V heads, or None.
        windows: where.
        how: of the clustered heads.

    Returns:
        ``[B, n]`` int64, whom each of the clustered heads follows, by their numbers among
        themselves; None where there is no kernel.
    """
    kernels = _kernels(query, key, value, windows.tokens.shape[1])
    if kernels is None:
        return None
    found: Tensor = kernels.representatives(query, key, value, windows, how)
    return found


def _kernels(
    query: Tensor, key: Tensor, value: Tensor | None, window: int | None = None
) -> ModuleType | None:
    """The launchers, if they take the shape."""
    if query.device.type != "cuda" or find_spec("triton") is None:
        return None
    from chai_attention.ops.triton import online

    return online if online.fits(query, key, value, window) else None
