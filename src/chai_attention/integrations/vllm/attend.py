"""Attention of one layer with the requests of a step, once their tokens stand in the pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chai_attention.integrations.vllm.copies import PageCopies
from chai_attention.integrations.vllm.memberships import (
    FixedMembership,
    PageMemberships,
    full_tokens,
    probe_range,
)
from chai_attention.integrations.vllm.pages import Pages
from chai_attention.integrations.vllm.per_request import Request, from_pages
from chai_attention.integrations.vllm.step import Packed, Part, Step
from chai_attention.integrations.vllm.step_rows import Row
from chai_attention.ops.narrow import FLOAT8
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.packed import paged_near
from chai_attention.ops.paged import paged_decode
from chai_attention.ops.paged_prefill import Probe, paged_prefill, varlen_prefill
from chai_attention.runtime.plan import LayerPlan

Window = dict[str, Any]  # the exact window's arguments of an operation
LEAST_VARLEN = 65  # queries of the longest prompt that are worth attending without pages


class StepAttention:
    """How a layer attends: whole batches by the kernels' operations, or requests one by one.

    Q, K and V of a step are ``[T, H, D]``, ``[T, G, D]`` and ``[T, G, Dv]``; pages are as
    `PageLayout.split` views them; the output is ``[T, H, Dv]``.

    Args:
        plan: the layer's heads on this rank.
        memberships: whom each request's heads follow.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
        together: whether whole batches go to one operation, as kernels want it.
        copies: memory for copies of 8-bit pages.
    """

    def __init__(
        self,
        plan: LayerPlan,
        memberships: FixedMembership | PageMemberships,
        scale: float,
        softcap: float | None,
        together: bool,
        copies: PageCopies | None = None,
    ):
        self.plan = plan
        self.memberships = memberships
        self.scale = scale
        self.softcap = softcap
        self.together = together
        self.copies = copies

    def reads_new(self, step: Step) -> bool:
        """Whether some requests attend to K and V of new tokens as they come, not in pages.

        Asked where pages are of 8 bits.
        """
        if not self.together:
            return True
        return bool(step.prefills) and (
            self.plan.needs_probe or any(part.fresh for part in self._parts(step, is_narrow=True))
        )

    def _parts(self, step: Step, is_narrow: bool) -> list[Part]:
        """The requests behind the decodes, by the operation that they need."""
        # prompts read 8-bit pages as copies, which windows have none of
        return step.prefilling(
            None if is_narrow and not self.plan.has_recent_window else LEAST_VARLEN
        )

    def near_pages(self, pages: Pages, table: Tensor | None, far_table: Tensor) -> NearPages | None:
        """The exact window of some requests of a step; None without one.

        Args:
            pages: the layer's.
            table: the requests' block table of near pages, None if there are none.
            far_table: that of far pages.
        """
        if not self.plan.has_recent_window:
            return None
        keys, values = pages.near_key, pages.near_value
        if keys is None or values is None or table is None:  # far pages hold all heads
            keys, values, table = pages.key[:, :, :0], pages.value[:, :, :0], far_table
        return NearPages(keys, values, table, self.plan.recent, self.plan.sinks)

    def near_slots(self, step: Step, pages: Pages) -> Tensor | None:
        """``[T]`` int64, where new tokens go in `near_pages`; None without an exact window."""
        if not self.plan.has_recent_window:
            return None
        if pages.near_key is None or step.near is None:
            return step.slot_mapping
        return step.near.slot_mapping

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
            self._decode(step, step.decoding, query, pages, out)
        if step.prefills:
            for part in self._parts(step, pages.key.dtype == FLOAT8):
                self._prefill(step, part, query, key, value, pages, out)
            if self.plan.needs_probe:
                self._behind_probes(step, query, key, value, out)

    def _decode(self, step: Step, part: Part, query: Tensor, pages: Pages, out: Tensor) -> None:
        """Attend with one token of each of the first requests."""
        member, rows = self.memberships.of(part.pages)
        window: Window = {}
        if self.plan.has_recent_window:
            near = self.near_pages(pages, part.near_table, part.block_table)
            window = {"near": near, "offset": self.memberships.offsets(part.pages)}
        paged_decode(
            query[part.tokens], pages.key, pages.value, part.block_table, member,
            lengths=part.lengths, scale=self.scale, softcap=self.softcap, rows=rows,
            out=out[part.tokens], most_keys=step.most_keys, **window,
        )  # fmt: skip

    def _prefill(
        self,
        step: Step,
        part: Part,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Pages,
        out: Tensor,
    ) -> None:
        """Attend with some of the requests behind the decodes."""
        query, key, value = (x[part.tokens] for x in (query, key, value))
        member, rows = self.memberships.of(part.pages)
        options: dict[str, Any] = {
            "query_starts": part.query_starts,
            "most_queries": part.most_queries,
            "scale": self.scale,
            "softcap": self.softcap,
            "rows": rows,
            "out": out[part.tokens],
        }
        if self.plan.needs_probe and part.begins:
            options["probe"] = Probe(query, key, value, self.plan.probe_end)
        if self.plan.has_recent_window:
            options["offset"] = self.memberships.offsets(part.pages)
        if part.fresh:
            varlen_prefill(
                query, key, value, member, natural_order=True, **options, **self._window()
            )
            return
        near = self.near_pages(pages, part.near_table, part.block_table)
        far, table = (pages.key, pages.value), part.block_table
        if pages.key.dtype == FLOAT8 and self.copies is not None:
            used, places = step.prefill_pages(pages.key.shape[1])
            copied = self.copies.of(far, used)
            if copied is not None:
                far, table = copied, places
        paged_prefill(query, *far, table, member, lengths=part.lengths, near=near, **options)

    def _window(self) -> Window:
        """The exact window of prompts that attend to K and V as they come."""
        if not self.plan.has_recent_window:
            return {}
        return {"recent": self.plan.recent, "sinks": self.plan.sinks}

    def _behind_probes(
        self, step: Step, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        """Put right where `Probe` went too far: behind a prompt that ends in the probe window.

        First tokens up to the window's end are done again, by clusters. That is rare and little:
        prompts that decide nothing, all at once, and short ones of requests that were preempted.
        """
        reach = probe_range(self.plan)
        undecided = step.undecided_tokens(*reach)
        if undecided is not None:
            out[undecided.tokens] = self._again(step, query, key, value, undecided)
        for row in step.begun_again(*reach):
            own, end = full_tokens(self.plan, row), min(self.plan.probe_end, row.tokens)
            one = Packed(
                torch.tensor([row.number], device=out.device),
                torch.arange(row.start, row.start + end, device=out.device),
                torch.arange(2, dtype=torch.int32, device=out.device) * end,
                end,
            )
            out[one.tokens] = self._again(step, query, key, value, one, own)

    def _again(
        self, step: Step, query: Tensor, key: Tensor, value: Tensor, some: Packed, own: int = 0
    ) -> Tensor:
        """Attend with first tokens of requests, the first ``own`` with all heads: ``[T', H, Dv]``.

        Q, K and V are those of the step.
        """
        q, k, v = (x[some.tokens] for x in (query, key, value))
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
        keys, values = (from_pages(x, table, row.length).to(q.dtype) for x in pages[:2])
        request = Request(q, k, v, keys, values, member, self.scale, self.softcap)
        line = slice(row.number, row.number + 1)
        near_table = None if step.near is None else step.near.block_table[line]
        near = self.near_pages(pages, near_table, step.block_table[line])
        if near is None:
            out[tokens] = request.attend()
        else:
            [near_keys] = paged_near(near, [(keys[0], values[0])], member, [row.tokens])
            offset = self.memberships.offsets(first)
            out[tokens] = request.attend_near(plan.recent, plan.sinks, offset, near_keys)
        own = full_tokens(plan, row)
        if own:
            out[row.start : row.start + own] = request.attend_fully(own)
