"""Attention of one layer with the requests of a step, once their tokens stand in the pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chai_attention.integrations.transformers.plan import LayerPlan
from chai_attention.integrations.vllm.copies import PageCopies
from chai_attention.integrations.vllm.memberships import (
    FixedMembership,
    PageMemberships,
    full_tokens,
)
from chai_attention.integrations.vllm.per_request import Request, from_pages
from chai_attention.integrations.vllm.step import Row, Step
from chai_attention.integrations.vllm.window import RecentPool
from chai_attention.ops.narrow import FLOAT8
from chai_attention.ops.paged import paged_decode
from chai_attention.ops.paged_prefill import Probe, paged_prefill, varlen_prefill

Before = dict[int, Tensor]

LEAST_VARLEN = 65  # queries of the longest prompt that are worth attending without pages


class StepAttention:
    """How a layer attends: whole batches by the kernels' operations, or requests one by one.

    Q, K and V of a step are ``[T, H, D]``, ``[T, G, D]`` and ``[T, G, Dv]``; pages are as
    `PageLayout.split` views them; the output is ``[T, H, Dv]``.

    Args:
        plan: the layer's heads on this rank.
        memberships: whom each request's heads follow.
        pool: memory of the exact recent window, None without one.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
        together: whether whole batches go to one operation, as kernels want it.
        copies: memory for copies of 8-bit pages.
    """

    def __init__(
        self,
        plan: LayerPlan,
        memberships: FixedMembership | PageMemberships,
        pool: RecentPool | None,
        scale: float,
        softcap: float | None,
        together: bool,
        copies: PageCopies | None = None,
    ):
        self.plan = plan
        self.memberships = memberships
        self.pool = pool
        self.scale = scale
        self.softcap = softcap
        self.together = together
        self.copies = copies

    def reads_new(self, step: Step) -> bool:
        """Whether some requests attend to K and V of new tokens as they come, not in pages."""
        if not self.together:
            return True
        return bool(step.prefills) and (self.pool is not None or self.plan.needs_probe)

    def before(self, step: Step) -> Before:
        """K of removed heads that the rings hold now and will not after this step's write.

        By row of those requests that attend one by one and are under way.
        """
        if self.pool is None or step.host_slots is None:
            return {}
        rows = step.prefills if self.together else step.rows
        reach = self.plan.recent - 1
        return {
            row.number: self.pool.last(
                step.host_slots[row.number], row.context, min(row.context, reach)
            )
            for row in rows
            if row.context
        }

    def run(
        self,
        step: Step,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: tuple[Tensor, Tensor],
        before: Before,
        out: Tensor,
    ) -> None:
        """Attend with all requests; ``before`` is what `before` gave ahead of the write."""
        if self.together and step.decodes:
            self._decode(step, query[: step.decodes], pages, out[: step.decodes])
        if self.together and self.pool is None:
            if step.prefills:
                self._prefill(step, query, key, value, pages, out)
            return
        for row in step.prefills if self.together else step.rows:
            if row.tokens:
                self._one(step, row, query, key, value, pages, before, out)

    def _decode(self, step: Step, query: Tensor, pages: tuple[Tensor, Tensor], out: Tensor) -> None:
        """Attend with one token of each of the first requests."""
        count = query.shape[0]
        first = step.pages[:count]
        member, rows = self.memberships.of(first)
        window: dict[str, Any] = {}
        if self.pool is not None:
            assert step.slots is not None
            window = {
                "near": self.pool.near,
                "slots": step.slots[:count],
                "offset": self.memberships.offsets(first),
            }
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
        pages: tuple[Tensor, Tensor],
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
        if pages[0].dtype == FLOAT8:
            table = step.block_table[count:]
            if self.copies is not None:
                used, places = step.prefill_pages(pages[0].shape[1])
                copied = self.copies.of(pages, used)
                if copied is not None:
                    pages, table = copied, places
            paged_prefill(query, *pages, table, member, lengths=step.lengths[count:], **options)
        # short prompts could as well: through pages they need no kernels of their own
        elif step.most_queries >= LEAST_VARLEN and all(row.context == 0 for row in step.prefills):
            varlen_prefill(query, key, value, member, natural_order=True, **options)
        else:
            paged_prefill(
                query, *pages, step.block_table[count:], member, lengths=step.lengths[count:],
                **options,
            )  # fmt: skip
        if probe is not None:
            for row in step.ending_before(probe.end):
                self._again(step, row, probe, out)

    def _again(self, step: Step, row: Row, probe: Probe, out: Tensor) -> None:
        """Attend by clusters where `Probe` went too far: behind a prompt that ends in the window.

        The first tokens of the request up to the window's end are done again, which is rare and
        little: short prompts of requests that were preempted, and prompts that decide nothing.
        """
        own, end = full_tokens(self.plan, row), min(probe.end, row.tokens)
        if own == end:
            return
        start = row.start - step.prefills[0].start
        tokens = slice(start, start + end)
        q, k, v = (x[tokens] for x in (probe.query, probe.key, probe.value))
        member, rows = self.memberships.of(step.pages[row.number : row.number + 1])
        varlen_prefill(
            q, k, v, member,
            query_starts=torch.arange(2, dtype=torch.int32, device=q.device) * end,
            most_queries=end, scale=self.scale, softcap=self.softcap, rows=rows,
            natural_order=True, probe=Probe(q, k, v, own) if own else None,
            out=out[row.start : row.start + end],
        )  # fmt: skip

    def _one(
        self,
        step: Step,
        row: Row,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: tuple[Tensor, Tensor],
        before: Before,
        out: Tensor,
    ) -> None:
        """Attend with the tokens of one request."""
        plan, tokens = self.plan, slice(row.start, row.stop)
        first = step.pages[row.number : row.number + 1]
        member, lines = self.memberships.of(first)
        if lines is not None:
            member = member.select(lines.long())
        q, k, v = (x[tokens].transpose(0, 1)[None] for x in (query, key, value))
        if row.context:
            table = step.block_table[row.number]
            keys, values = (from_pages(states, table, row.length).to(q.dtype) for states in pages)
        else:
            keys = k.index_select(1, member.key_heads[0])
            values = v[0].transpose(0, 1).index_select(1, member.value_heads[0])
            values = values.transpose(0, 1)[None]
        request = Request(q, k, v, keys, values, member, self.scale, self.softcap)
        if self.pool is None:
            out[tokens] = request.attend()
        else:
            assert step.host_slots is not None
            slot = step.host_slots[row.number]
            out[tokens] = request.attend_near(
                plan.recent,
                plan.sinks,
                self.memberships.offsets(first),
                self.pool.first(slot, min(plan.sinks, row.length)),
                before.get(row.number, k[:, :0, :0]),
            )
        own = full_tokens(plan, row)
        if own:
            out[row.start : row.start + own] = request.attend_fully(own)
