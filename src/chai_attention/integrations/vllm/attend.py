"""Attention of one layer with the requests of a step, once their tokens stand in the pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chai_attention.integrations.transformers.plan import LayerPlan
from chai_attention.integrations.vllm.copies import PageCopies
from chai_attention.integrations.vllm.memberships import (
    FixedMembership,
    PageMemberships,
    full_tokens,
    probe_range,
)
from chai_attention.integrations.vllm.per_request import Request, from_pages
from chai_attention.integrations.vllm.step import Packed, Row, Step
from chai_attention.ops.narrow import FLOAT8
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.packed import paged_near
from chai_attention.ops.paged import paged_decode
from chai_attention.ops.paged_prefill import Probe, paged_prefill, varlen_prefill

Pages = tuple[Tensor, Tensor]  # of K and V
Window = dict[str, Any]  # the exact window's arguments of an operation
LEAST_VARLEN = 65  # queries of the longest prompt that are worth attending without pages


class StepAttention:
    """How a layer attends: whole batches by the kernels' operations, or requests one by one.

    Q, K and V of a step are ``[T, H, D]``, ``[T, G, D]`` and ``[T, G, Dv]``; pages are as
    `PageLayout.split` views them; the output is ``[T, H, Dv]``.

    Args:
        plan: the layer's heads on this rank.
        memberships: whom each request's heads follow.
        near: gives the near pages of K and V that far pages do not hold; None if there are none.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
        together: whether whole batches go to one operation, as kernels want it.
        copies: memory for copies of 8-bit pages.
    """

    def __init__(
        self,
        plan: LayerPlan,
        memberships: FixedMembership | PageMemberships,
        near: Callable[[], Pages] | None,
        scale: float,
        softcap: float | None,
        together: bool,
        copies: PageCopies | None = None,
    ):
        self.plan = plan
        self.memberships = memberships
        self.near = near
        self.scale = scale
        self.softcap = softcap
        self.together = together
        self.copies = copies

    def reads_new(self, step: Step) -> bool:
        """Whether some requests attend to K and V of new tokens as they come, not in pages."""
        return not self.together or (bool(step.prefills) and self.plan.needs_probe)

    def near_pages(
        self, step: Step, pages: Pages, start: int = 0, stop: int | None = None
    ) -> NearPages | None:
        """The exact window of the requests from ``start`` to ``stop``; None without one."""
        if not self.plan.has_recent_window:
            return None
        if self.near is not None and step.near is not None:
            (keys, values), table = self.near(), step.near.block_table
        else:  # far pages hold all heads
            keys, values = (states[:, :, :0] for states in pages)
            table = step.block_table
        return NearPages(keys, values, table[start:stop], self.plan.recent, self.plan.sinks)

    def near_slots(self, step: Step) -> Tensor | None:
        """``[T]`` int64, where new tokens go in `near_pages`; None without an exact window."""
        if not self.plan.has_recent_window:
            return None
        return (
            step.slot_mapping if self.near is None or step.near is None else step.near.slot_mapping
        )

    def run(
        self, step: Step, query: Tensor, key: Tensor, value: Tensor, pages: Pages, out: Tensor
    ) -> None:
        """Attend with all requests, whose new tokens stand in the pages."""
        if not self.together:
            for row in step.rows:
                if row.tokens:
                    self._one(step, row, query, key, value, pages, out)
            return
        if step.decodes:
            self._decode(step, query[: step.decodes], pages, out[: step.decodes])
        if step.prefills:
            self._prefill(step, query, key, value, pages, out)

    def _decode(self, step: Step, query: Tensor, pages: Pages, out: Tensor) -> None:
        """Attend with one token of each of the first requests."""
        count = query.shape[0]
        first = step.pages[:count]
        member, rows = self.memberships.of(first)
        window: Window = {}
        if self.plan.has_recent_window:
            near = self.near_pages(step, pages, 0, count)
            window = {"near": near, "offset": self.memberships.offsets(first)}
        paged_decode(
            query, *pages, step.block_table[:count], member, lengths=step.lengths[:count],
            scale=self.scale, softcap=self.softcap, rows=rows, out=out, most_keys=step.most_keys,
            **window,
        )  # fmt: skip

    def _prefill(
        self,
        step: Step,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Pages,
        out: Tensor,
    ) -> None:
        """Attend with the requests behind the decodes."""
        count = step.decodes
        tokens = slice(step.prefills[0].start, step.prefills[-1].stop)
        query, key, value = query[tokens], key[tokens], value[tokens]
        probe = None
        if self.plan.needs_probe:
            probe = Probe(query, key, value, self.plan.probe_end)
        member, rows = self.memberships.of(step.pages[count:])
        options: dict[str, Any] = {
            "query_starts": step.prefill_starts,
            "most_queries": step.most_queries,
            "scale": self.scale,
            "softcap": self.softcap,
            "rows": rows,
            "probe": probe,
            "out": out[tokens],
        }
        if self.plan.has_recent_window:
            options["offset"] = self.memberships.offsets(step.pages[count:])
        # short prompts could as well: through pages they need no kernels of their own
        if (
            pages[0].dtype != FLOAT8
            and step.most_queries >= LEAST_VARLEN
            and all(row.context == 0 for row in step.prefills)
        ):
            varlen_prefill(
                query, key, value, member, natural_order=True, **options, **self._window()
            )
            self._behind_probes(step, probe, out)
            return
        table, near = step.block_table[count:], self.near_pages(step, pages, count)
        if pages[0].dtype == FLOAT8 and self.copies is not None and near is None:
            used, places = step.prefill_pages(pages[0].shape[1])
            copied = self.copies.of(pages, used)
            if copied is not None:
                pages, table = copied, places
        paged_prefill(
            query, *pages, table, member, lengths=step.lengths[count:], near=near, **options
        )
        self._behind_probes(step, probe, out)

    def _window(self) -> Window:
        """The exact window of prompts that attend to K and V as they come."""
        if not self.plan.has_recent_window:
            return {}
        return {"recent": self.plan.recent, "sinks": self.plan.sinks}

    def _behind_probes(self, step: Step, probe: Probe | None, out: Tensor) -> None:
        """Put right where `Probe` went too far: behind a prompt that ends in the probe window.

        First tokens up to the window's end are done again, by clusters. That is rare and little:
        prompts that decide nothing, all at once, and short ones of requests that were preempted.
        """
        if probe is None:
            return
        reach = probe_range(self.plan)
        undecided = step.undecided_tokens(*reach)
        if undecided is not None:
            out[undecided.tokens] = self._again(step, probe, undecided)
        for row in step.begun_again(*reach):
            own, end = full_tokens(self.plan, row), min(probe.end, row.tokens)
            one = Packed(
                torch.tensor([row.number], device=out.device),
                torch.arange(row.start, row.start + end, device=out.device),
                torch.arange(2, dtype=torch.int32, device=out.device) * end,
                end,
            )
            out[row.start : row.start + end] = self._again(step, probe, one, own)

    def _again(self, step: Step, probe: Probe, some: Packed, own: int = 0) -> Tensor:
        """Attend with first tokens of requests, the first ``own`` with all heads: ``[T', H, Dv]``.

        K and V of `Probe` begin where the requests behind the decodes do.
        """
        tokens = some.tokens - step.prefills[0].start
        q, k, v = (x[tokens] for x in (probe.query, probe.key, probe.value))
        first = step.pages[some.rows]
        member, rows = self.memberships.of(first)
        window = self._window()
        if window:
            window["offset"] = self.memberships.offsets(first)
        return varlen_prefill(
            q, k, v, member, query_starts=some.starts, most_queries=some.most, scale=self.scale,
            softcap=self.softcap, rows=rows, natural_order=True,
            probe=Probe(q, k, v, own) if own else None, **window,
        )[0]  # fmt: skip

    def _one(
        self,
        step: Step,
        row: Row,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Pages,
        out: Tensor,
    ) -> None:
        """Attend with the tokens of one request."""
        plan, tokens = self.plan, slice(row.start, row.stop)
        first = step.pages[row.number : row.number + 1]
        member, lines = self.memberships.of(first)
        if lines is not None:
            member = member.select(lines.long())
        q, k, v = (x[tokens].transpose(0, 1)[None] for x in (query, key, value))
        table = step.block_table[row.number]
        keys, values = (from_pages(states, table, row.length).to(q.dtype) for states in pages)
        request = Request(q, k, v, keys, values, member, self.scale, self.softcap)
        near = self.near_pages(step, pages, row.number, row.number + 1)
        if near is None:
            out[tokens] = request.attend()
        else:
            [near_keys] = paged_near(near, [(keys[0], values[0])], member, [row.tokens])
            offset = self.memberships.offsets(first)
            out[tokens] = request.attend_near(plan.recent, plan.sinks, offset, near_keys)
        own = full_tokens(plan, row)
        if own:
            out[row.start : row.start + own] = request.attend_fully(own)
