"""Memberships of running requests, found by the first page of each.

A request's membership has to be found again in every step, also after vLLM moved its row, and by
other requests that share its first page (prefix caching). The page's number does all that: it is
the request's until its K and V are dropped, and whoever reads that page needs its membership.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.integrations.vllm.layers import ServedLayer
from chai_attention.membership import Membership
from chai_attention.ops import windowed


class PageMemberships:
    """Tables of one layer with a row per page; only rows of first pages are used.

    Args:
        layer: the layer.
        pages: P, pages of the cache.
        device: the cache's.
    """

    def __init__(self, layer: ServedLayer, pages: int, device: torch.device):
        self.layer = layer
        self.pages = pages
        representatives = torch.tensor([layer.fallback], device=device).repeat(pages, 1)
        self._all = layer.membership_of(representatives)
        table = layer.plan.offset_table(device) if layer.plan.has_recent_window else None
        self._offsets = table
        self._offset: Tensor | None = None  # [P, H]
        if table is not None:
            self._offset = windowed.head_offsets(table, self._all)

    def of(self, pages: Tensor) -> tuple[Membership, Tensor | None]:
        """Tables for requests with these first pages, ``[B]`` int32, and which row each has.

        On CUDA the tables are all pages' and stay where they are, for CUDA graphs.
        """
        if pages.is_cuda:
            return self._all, pages
        return self._all.select(pages.long()), None

    def offsets(self, pages: Tensor) -> Tensor | None:
        """``[B, H]`` float32 added to the far keys' log-sum-exp (`windowed`), None for zeros."""
        return None if self._offset is None else self._offset[pages.long()]

    def publish(self, pages: Tensor, membership: Membership) -> None:
        """Set the memberships of requests with first pages ``[B]``.

        Everything that was made of the tables is brought up to date in place.
        """
        rows = pages.long()
        self._all.representatives[rows] = membership.representatives
        for name, table in vars(self._all).items():
            if isinstance(table, Tensor) and name != "representatives":
                table[rows] = getattr(membership, name)
        if self._offset is not None and self._offsets is not None:
            self._offset[rows] = windowed.head_offsets(self._offsets, membership)
        if pages.is_cuda:
            _update_chunks(self._all, rows, membership)


def _update_chunks(tables: Membership, rows: Tensor, new: Membership) -> None:
    """Bring what kernels made of ``tables`` up to date in the rows ``rows [B]``."""
    from chai_attention.ops.triton import chunks, paged_prefill

    for made, make in (
        (chunks._made, chunks.chunks_of),
        (paged_prefill._natural, paged_prefill.natural_chunks),
    ):
        for members, held in made.get(tables, {}).items():
            fresh = make(new, members)
            for name in ("slot", "query", "key", "head", "value"):
                getattr(held, name)[rows] = getattr(fresh, name)
