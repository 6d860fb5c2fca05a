"""Memberships of running requests, found by the first page of each.

A request's membership has to be found again in every step, also after vLLM moved its row, and by
other requests that share its first page (prefix caching). The page's number does all that: it is
the request's until its K and V are dropped, and whoever reads that page needs its membership.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.integrations.transformers.plan import LayerPlan
from chai_attention.integrations.vllm.layers import ServedLayer
from chai_attention.integrations.vllm.step import Row, Step
from chai_attention.membership import Membership
from chai_attention.ops import windowed
from chai_attention.ops.rows import update_rows

LEAST_PROBE = 5  # tokens that a membership is decided on at least (the paper's window)


def probe_range(plan: LayerPlan) -> tuple[int, int, int]:
    """Where the probe window begins and ends, and how many of its tokens decide at least."""
    return plan.probe_start, plan.probe_end, min(LEAST_PROBE, plan.window)


def full_tokens(plan: LayerPlan, row: Row) -> int:
    """First new tokens of a request that attend with all heads.

    They are those of its prompt up to the window's end. A request that these do not decide runs
    like one of a static profile from its first token on, however its prompt is cut into chunks.
    """
    if row.context or not plan.needs_probe:
        return 0
    start, end, least = probe_range(plan)
    first = row.first(end)
    return first if first - start >= least else 0


class FixedMembership:
    """One membership for all requests.

    Args:
        layer: the layer; it has no probe window.
        rows: most requests of a step.
        device: the cache's.
    """

    def __init__(self, layer: ServedLayer, rows: int, device: torch.device):
        self._membership = layer.membership(device)
        self._offset: Tensor | None = None
        if layer.plan.has_recent_window:
            offset = windowed.head_offsets(layer.plan.offset_table(device), self._membership)
            self._offset = None if offset is None else offset.repeat(rows, 1)

    def of(self, pages: Tensor) -> tuple[Membership, Tensor | None]:
        """As `PageMemberships.of`; one row of tables for all."""
        return self._membership, None

    def offsets(self, pages: Tensor) -> Tensor | None:
        """As `PageMemberships.offsets`."""
        return None if self._offset is None else self._offset[: pages.shape[0]]


class PageMemberships:
    """Tables of one layer with a row per page; only rows of first pages are used.

    Args:
        layer: the layer.
        pages: P, pages of the cache.
        device: the cache's.
        together: whether all requests that start in a step are clustered at once, as kernels want
            it, or those with windows of one length, as the Transformers runtime does.
    """

    def __init__(
        self, layer: ServedLayer, pages: int, device: torch.device, together: bool = False
    ):
        self.layer = layer
        self.together = together
        self.pages = pages
        self._fallback = layer.membership(device)
        representatives = self._fallback.representatives.repeat(pages, 1)
        self._all = layer.membership_of(representatives)
        self._offset: Tensor | None = None  # [P, H]
        self._offsets: Tensor | None = None  # [H, H]
        if layer.plan.has_recent_window:
            self._offsets = layer.plan.offset_table(device)
            self._offset = windowed.head_offsets(self._offsets, self._all)

    def of(self, pages: Tensor) -> tuple[Membership, Tensor | None]:
        """Tables for requests with these first pages, ``[B]`` int32, and which row each has.

        On CUDA the tables are all pages' and stay where they are, for CUDA graphs.
        """
        if pages.is_cuda:
            return self._all, pages
        return self._all.select(pages.long()), None

    def offsets(self, pages: Tensor) -> Tensor | None:
        """``[B, H]`` float32 added to the far keys' log-sum-exp (`windowed`), None for zeros."""
        return None if self._offset is None else self._offset.index_select(0, pages)

    def publish(self, pages: Tensor, membership: Membership) -> None:
        """Set the memberships of requests with first pages ``[B]``.

        Everything that was made of the tables is brought up to date in place.
        """
        rows = pages.long()
        update_rows(self._all, rows, membership)
        # what does not depend on who is in which cluster stays
        if self._offset is not None and self._offsets is not None:
            self._offset[rows] = windowed.head_offsets(self._offsets, membership)

    def begin(self, step: Step) -> None:
        """Give requests that start with too few tokens to tell what is known without a request."""
        rows = step.undecided(*probe_range(self.layer.plan))
        if rows is not None:
            self.publish(step.pages[rows], self._fallback.expand(len(rows)))

    def probe(
        self, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float,
        softcap: float | None,
    ) -> None:  # fmt: skip
        """Cluster the heads of the other requests that start, each on its own first tokens.

        Args:
            step: the step.
            query: ``[T, H, D]`` of its tokens.
            key: ``[T, G, D]``.
            value: ``[T, G, Dv]``.
            scale: factor on the scores.
            softcap: as in `ops.reference.attention`.
        """
        start, end, least = probe_range(self.layer.plan)
        if self.together:
            found = step.deciders(start, end, least)
            groups = [] if found is None else [found]
        else:
            groups = [g for g in step.beginners(start, end) if g.window.shape[1] >= least]
        for group in groups:
            q, k, v = (x[group.window] for x in (query, key, value))
            if group.real is not None:
                # without scores all heads' maps are alike, which moves no head from another
                q = q.masked_fill(~group.real, 0.0)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            member = self.layer.plan.online_membership(q, k, v, scale, softcap)
            # how many K heads grouped queries need depends on the request; pages hold the most
            if member.kept_keys != self.layer.kept or member.streaming != self.layer.streaming:
                member = self.layer.membership_of(member.representatives)
            self.publish(group.pages, member)
