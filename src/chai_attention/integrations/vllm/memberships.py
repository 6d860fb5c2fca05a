"""Memberships of running requests, found by the first page of each.

A request's membership has to be found again in every step, also after vLLM moved its row, and by
other requests that share its first page (prefix caching). The page's number does all that: it is
the request's until its K and V are dropped, and whoever reads that page needs its membership.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.integrations.vllm.layers import ServedLayer
from chai_attention.integrations.vllm.step import Step
from chai_attention.integrations.vllm.step_rows import Row
from chai_attention.membership import Membership
from chai_attention.ops import windowed
from chai_attention.ops.rows import MembershipRows
from chai_attention.runtime.plan import LayerPlan

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
        self._range = probe_range(layer.plan)
        fallback = layer.membership(device)
        self._fallback = fallback.representatives  # [1, H]
        if (clustered := layer.plan.clustered) is not None:
            # of the heads that a membership is found for, by their numbers among themselves
            inside = {head: number for number, head in enumerate(clustered)}
            own = [[inside[layer.fallback[head]] for head in clustered]]
            self._fallback = torch.tensor(own, device=device)
        self._rows = MembershipRows(
            layer.membership_of(fallback.representatives.repeat(pages, 1)),
            layer.plan.offset_table(device) if layer.plan.has_recent_window else None,
            layer.plan.has_recent_window,
            clustered,
        )
        self._all = self._rows.membership

    def of(self, pages: Tensor) -> tuple[Membership, Tensor | None]:
        """Tables for requests with these first pages, ``[B]`` int32, and which row each has.

        On CUDA the tables are all pages' and stay where they are, for CUDA graphs.
        """
        if pages.is_cuda:
            return self._all, pages
        return self._all.select(pages.long()), None

    def offsets(self, pages: Tensor) -> Tensor | None:
        """``[B, H]`` float32 added to the far keys' log-sum-exp (`windowed`), None for zeros."""
        offset = self._rows.offset
        return None if offset is None else offset.index_select(0, pages)

    def publish(self, pages: Tensor, representatives: Tensor) -> None:
        """Set the memberships of requests with first pages ``[B]`` int32.

        Everything that was made of the tables is brought up to date in place.

        Args:
            pages: the first page of each request.
            representatives: ``[B or 1, n]`` int64 of the heads that the plan clusters.
        """
        self._rows.put(pages, representatives)

    def begin(self, step: Step) -> None:
        """Give requests that start with too few tokens to tell what is known without a request."""
        pages = step.undecided_pages(*self._range)
        if pages is not None:
            self.publish(pages, self._fallback)

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
        if not step.fresh:
            return
        start, end, least = self._range
        if self.together:
            found = step.deciders(start, end, least)
            groups = [] if found is None else [found]
        else:
            groups = [g for g in step.beginners(start, end) if g.window.shape[1] >= least]
        for group in groups:
            representatives = self.layer.plan.packed_representatives(
                query, key, value, group.window, group.real, scale, softcap
            )
            self.publish(group.pages, representatives)
