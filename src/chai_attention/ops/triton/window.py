"""Prefill with an exact window in one launch: chooses the kernel."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.near import NearKeys
from chai_attention.ops.triton.checks import check
from chai_attention.ops.triton.chunks import chunks_of, members_of
from chai_attention.ops.triton.decode import padded
from chai_attention.ops.triton.device import capability
from chai_attention.ops.triton.prefill import COLUMNS

if TYPE_CHECKING:
    from chai_attention.ops.windowed import WindowTables

logger = logging.getLogger("chai_attention")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    near: NearKeys,
    tables: WindowTables,
    *,
    scale: float,
    offset: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor | None:
    """`ops.windowed.attention` of several queries; None where no kernel takes it.

    Raises:
        AttentionInputError: a dtype or head size without a kernel, or strided head dimensions.
    """
    check(query, key, value, *near)
    batch, heads, queries, dim = query.shape
    if capability(query.device)[0] != 9 or softcap is not None or tables.padded:
        return None
    from chai_attention.ops.triton import launch_hopper

    columns = COLUMNS // padded(max(dim, value.shape[3]))
    members = members_of(len(membership.far_heads), membership.clusters, columns)
    members = min(2, max(members, min(launch_hopper.WIDTHS) // dim))
    far_key = far_value = None
    if tables.far is not None and membership.far is not None:
        far_key, far_value = key[:, :, tables.far], value[:, :, tables.far]
    fits = launch_hopper.fits(query, *near, members)
    if far_key is not None and far_value is not None:
        fits = fits and launch_hopper.fits(query, far_key, far_value, members)
    if not fits or queries < launch_hopper.LEAST_QUERIES or tables.sinks > launch_hopper.SINKS:
        return None
    logger.debug("Hopper prefill kernel with a window: %d members a program", members)
    out = torch.empty(batch, queries, heads, value.shape[3], dtype=value.dtype, device=query.device)
    launch_hopper.prefill_window(
        query, far_key, far_value, chunks_of(membership, members), near, out, scale=scale,
        offset=offset, past=tables.length - queries, recent=tables.recent, sinks=tables.sinks,
    )  # fmt: skip
    return out
