"""Attention of one layer with the requests of a step, once their tokens stand in the pages."""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.integrations.vllm.copies import LEAST_QUERIES, DequantisationWorkspace
from chai_attention.integrations.vllm.decode_graphs import DecodeGraphs, DecodeMemory
from chai_attention.integrations.vllm.layers import Pages
from chai_attention.integrations.vllm.memberships import (
    FixedMembership,
    PageMemberships,
    full_tokens,
    probe_range,
)
from chai_attention.integrations.vllm.metadata import ChaiMetadata, PackedTokens, SubBatch
from chai_attention.ops import (
    AttentionCall,
    PackedKV,
    PackedQueries,
    PagedKV,
    Probe,
    paged_decode,
    paged_prefill,
    varlen_prefill,
)
from chai_attention.ops.local_pages import LocalPages
from chai_attention.runtime.plan import LayerPlan

LEAST_VARLEN = 65  # queries of the longest prompt that are worth attending without pages


class StepAttention:
    """How a layer attends: all requests of a kind by one operation.

    Q, K and V of a step are ``[T, H, D]``, ``[T, G, D]`` and ``[T, G, Dv]``; pages are as
    `PageLayout.split` views them; the output is ``[T, H, Dv]``.

    Args:
        plan: the layer's heads on this rank.
        memberships: of the layer's requests.
        scale: factor on the scores.
        softcap: as in `ops.reference.clustered_attention`.
        workspace: for copies of 8-bit pages; None if pages are of the model's dtype.
    """

    def __init__(
        self,
        plan: LayerPlan,
        memberships: FixedMembership | PageMemberships,
        scale: float,
        softcap: float | None,
        workspace: DequantisationWorkspace | None = None,
    ):
        self.plan = plan
        self.memberships = memberships
        self.scale = scale
        self.softcap = softcap
        self.workspace = workspace
        self._graphs: DecodeGraphs | None = None

    def capture(self, pages: Pages, memory: DecodeMemory) -> None:
        """Capture decodes over these pages, for steps that vLLM has no graph of."""

        def attend(part: SubBatch, query: Tensor, out: Tensor) -> None:
            self._decode(part, query, pages, out)

        self._graphs = DecodeGraphs(memory, attend)

    def reads_new(self, step: ChaiMetadata) -> bool:
        """Whether some requests attend to K and V of new tokens as they come, not in pages.

        Asked where pages are of 8 bits, for static memberships.
        """
        return any(part.is_new for part in step.prefill_batches(LEAST_VARLEN))

    def local_pages(
        self, pages: Pages, table: Tensor | None, far_table: Tensor
    ) -> LocalPages | None:
        """The exact window of some requests of a step; None without one.

        Args:
            pages: the layer's.
            table: the requests' block table of local pages, None if there are none.
            far_table: that of far pages.
        """
        if not self.plan.has_recent_window:
            return None
        keys, values = pages.local_key, pages.local_value
        if keys is None or values is None or table is None:  # far pages hold all heads
            keys, values, table = pages.key[:, :, :0], pages.value[:, :, :0], far_table
        return LocalPages(keys, values, table, self.plan.recent, self.plan.sinks)

    def local_slots(self, step: ChaiMetadata, pages: Pages) -> Tensor | None:
        """``[T]`` int64, where new tokens go in `local_pages`; None without an exact window."""
        if not self.plan.has_recent_window:
            return None
        if pages.local_key is None or step.local is None:
            return step.slot_mapping
        return step.local.slot_mapping

    def run(
        self,
        step: ChaiMetadata,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Pages,
        out: Tensor,
    ) -> None:
        """Attend with all requests, whose new tokens stand in the pages."""
        if step.num_decodes and not (self._graphs and self._graphs.run(step, query, out)):
            part = step.decode_batch
            self._decode(part, query[part.tokens], pages, out[part.tokens])
        if step.prefills:
            for part in step.prefill_batches(LEAST_VARLEN):
                self._prefill(step, part, query, key, value, pages, out)
            if self.plan.needs_probe:
                self._behind_probes(step, query, key, value, out)

    def _decode(self, part: SubBatch, query: Tensor, pages: Pages, out: Tensor) -> None:
        """Attend with one token of each request: ``query [B, H, D]``, ``out [B, H, Dv]``."""
        local = self.local_pages(pages, part.local_table, part.block_table)
        kv = PagedKV(
            pages.key, pages.value, part.block_table, part.seq_lens, local, part.max_seq_len
        )  # fmt: skip
        paged_decode(query, kv, self._call(part.first_pages), out)

    def _call(self, first_pages: Tensor) -> AttentionCall:
        """How requests with these first pages attend."""
        member, ids = self.memberships.of(first_pages)
        offset = self.memberships.offsets(first_pages) if self.plan.has_recent_window else None
        return AttentionCall(member, self.scale, self.softcap, ids, offset)

    def _prefill(
        self,
        step: ChaiMetadata,
        part: SubBatch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Pages,
        out: Tensor,
    ) -> None:
        """Attend with some of the requests behind the decodes."""
        if part.tokens != slice(0, query.shape[0]):  # views take time, in every layer
            query, key, value, out = (x[part.tokens] for x in (query, key, value, out))
        probe = None
        if self.plan.needs_probe and part.has_new:
            probe = Probe(query, key, value, self.plan.probe_end)
        queries = PackedQueries(query, part.query_start_loc, part.max_query_len, part.shared)
        call = self._call(part.first_pages)
        if part.is_new:
            varlen_prefill(queries, self._new(key, value), call, out, probe)
            return
        copies = self._copies(step, part, pages)
        if copies is not None:
            paged_prefill(queries, copies, call, out, probe)
            if not step.is_warm_up:  # which compiles the kernels of both ways
                return
        local = self.local_pages(pages, part.local_table, part.block_table)
        kv = PagedKV(
            pages.key, pages.value, part.block_table, part.seq_lens, local, part.max_seq_len,
            pages.shared,
        )  # fmt: skip
        paged_prefill(queries, kv, call, out, probe)

    def _copies(self, step: ChaiMetadata, part: SubBatch, pages: Pages) -> PagedKV | None:
        """Copies of the 8-bit pages that some requests read; None where they read the pages."""
        if self.workspace is None or part.max_query_len < LEAST_QUERIES:
            return None
        asked = part.start, part.stop
        far, local = step.used_pages(*asked, pages.key.shape[1]), None
        if pages.local_key is not None and part.local_table is not None:
            # the host may take the window for later than it is
            recent, sinks = self.plan.recent + self.workspace.drafts, self.plan.sinks
            local = step.used_local_pages(*asked, pages.local_key.shape[1], recent, sinks)
        copies = self.workspace.widen(pages, far, local)
        if copies is None:
            return None
        window = self.local_pages(
            copies, None if local is None else local.block_table, far.block_table
        )
        return PagedKV(copies.key, copies.value, far.block_table, part.seq_lens, window)

    def _new(self, key: Tensor, value: Tensor) -> PackedKV:
        """K and V of prompts that attend to them as they come."""
        if not self.plan.has_recent_window:
            return PackedKV(key, value, natural_order=True)
        return PackedKV(key, value, True, self.plan.recent, self.plan.sinks)

    def _behind_probes(
        self, step: ChaiMetadata, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        """Attend again where `Probe` reached too far.

        `Probe` takes all tokens up to the probe window's end. Those of a prompt that decides
        nothing, and those behind a prompt that ends in the window (of a preempted request), have to
        attend by clusters. That is rare and little.
        """
        reach = probe_range(self.plan)
        undecided = step.undecided_tokens(*reach)
        if undecided is not None:
            out[undecided.tokens] = self._again(step, query, key, value, undecided)
        for each in step.begun_again(*reach):
            own, end = full_tokens(self.plan, each), min(self.plan.probe_end, each.query_len)
            one = PackedTokens(
                torch.tensor([each.req_index], device=out.device),
                torch.arange(each.start, each.start + end, device=out.device),
                torch.arange(2, dtype=torch.int32, device=out.device) * end,
                end,
            )
            out[one.tokens] = self._again(step, query, key, value, one, own)

    def _again(
        self,
        step: ChaiMetadata,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        some: PackedTokens,
        own: int = 0,
    ) -> Tensor:
        """Attend with first tokens of requests, the first ``own`` with all heads: ``[T', H, Dv]``.

        Q, K and V are those of the step.
        """
        q, k, v = (x[some.tokens] for x in (query, key, value))
        call = self._call(step.first_pages[some.requests])
        probe = Probe(q, k, v, own) if own else None
        queries = PackedQueries(q, some.query_start_loc, some.max_query_len)
        return varlen_prefill(queries, self._new(k, v), call, probe=probe)[0]
