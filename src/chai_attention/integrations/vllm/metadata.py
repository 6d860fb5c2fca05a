"""What all clustered layers need to know about one step of vLLM, made once for all of them.

What it asks of single requests it asks of `RequestSpans`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from itertools import accumulate
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from chai_attention.integrations.vllm.copies import UsedPages, pages_between
from chai_attention.integrations.vllm.layers import sink_pages
from chai_attention.integrations.vllm.request_spans import RequestSpan, RequestSpans

Asked = ParamSpec("Asked")
Made = TypeVar("Made")


class LocalTables(NamedTuple):
    """Where the local K and V of a step's requests and of its new tokens stand.

    Attributes:
        block_table: ``[B, max_pages]`` int32, local pages; any number for those given back.
        slot_mapping: ``[T]`` int64, where each token goes in the local pages; -1 for padding.
    """

    block_table: Tensor
    slot_mapping: Tensor


class SubBatch(NamedTuple):
    """Neighbouring requests of a step that one operation attends with.

    Attributes:
        start: the first one's place in the step.
        tokens: theirs among those of the step.
        query_start_loc: ``[n + 1]`` int32, where each request's tokens begin, counted from those of
            the first one, and the end.
        max_query_len: no request has more new tokens.
        max_seq_len: no request has more tokens.
        is_new: whether none has context.
        has_new: whether some has none.
        first_pages: ``[n]`` int32, as in `ChaiMetadata`, as are the next three.
        block_table: ``[n, max_pages]`` int32.
        seq_lens: ``[n]`` int32.
        local_table: ``[n, max_local_pages]`` int32, None without local pages.
        shared: `PackedQueries.shared` of all layers.
    """

    start: int
    tokens: slice
    query_start_loc: Tensor
    max_query_len: int
    max_seq_len: int
    is_new: bool
    has_new: bool
    first_pages: Tensor
    block_table: Tensor
    seq_lens: Tensor
    local_table: Tensor | None
    shared: dict[Any, Any] | None = None

    @property
    def stop(self) -> int:
        """Behind the last one's place in the step."""
        return self.start + self.seq_lens.shape[0]


class NewRequests(NamedTuple):
    """Requests that start with a step, and their prompts' tokens in the probe window.

    Attributes:
        first_pages: ``[n]`` int32, the first page of each.
        window: ``[n, W]`` int64, the window's tokens among those of the step.
        real: ``[n]`` int32, how many of them are there; a prompt that ends in the window has
            others of its tokens behind them.
    """

    first_pages: Tensor
    window: Tensor
    real: Tensor


class PackedTokens(NamedTuple):
    """Some requests' first tokens, one request after the other.

    Attributes:
        requests: ``[n]`` int64, the requests' places in the step.
        tokens: ``[T']`` int64, their tokens among those of the step.
        query_start_loc: ``[n + 1]`` int32, where each request's begin, and the end.
        max_query_len: no request has more.
    """

    requests: Tensor
    tokens: Tensor
    query_start_loc: Tensor
    max_query_len: int


def _once(
    make: Callable[Concatenate[ChaiMetadata, Asked], Made],
) -> Callable[Concatenate[ChaiMetadata, Asked], Made]:
    """Let all layers that ask with the same arguments share what is made."""

    @wraps(make)
    def shared(step: ChaiMetadata, /, *asked: Asked.args, **named: Asked.kwargs) -> Made:
        key = make, *asked
        if key not in step._made:
            step._made[key] = make(step, *asked, **named)
        made: Made = step._made[key]
        return made

    return shared


@dataclass(eq=False)
class ChaiMetadata:
    """One forward of a batch: T tokens of B requests, packed.

    What layers derive from it is made once and shared.

    Attributes:
        requests: all of them. Those that only pad a CUDA graph are among the first ``num_decodes``.
        num_actual_tokens: T.
        num_decodes: so many leading requests have one token each, all others come behind them.
        query_start_loc: ``[B + 1]`` int32, where each request's tokens begin, and the end.
        seq_lens: ``[B]`` int32, tokens of each request with the new ones; 0 for padding.
        block_table: ``[B, max_pages]`` int32.
        slot_mapping: ``[T]`` int64, where each token goes in the pages; -1 for padding.
        first_pages: ``[B]`` int32, first page of each request; filled only where memberships depend
            on requests, as is ``token_pages``.
        token_pages: ``[T]`` int32, first page of each token's request.
        max_query_len: no request has more new tokens.
        max_seq_len: no request has more tokens.
        is_capture: whether this is a dummy for a CUDA graph.
        local: the local pages, which vLLM describes after all else; None without any.
        is_warm_up: whether this is a dummy that compiles kernels (`warm_up.steps`).
        schedules: FlashAttention's, by the numbers of kept query and K/V heads (`FlashSchedules`).
    """

    requests: RequestSpans
    num_actual_tokens: int
    num_decodes: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    first_pages: Tensor
    token_pages: Tensor
    max_query_len: int
    max_seq_len: int
    is_capture: bool
    local: LocalTables | None = None
    is_warm_up: bool = False
    schedules: dict[tuple[int, int], Any] = field(default_factory=dict)
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @cached_property
    def new(self) -> list[RequestSpan]:
        """Requests that start with this step."""
        return [] if self.is_capture else self.requests.new()

    @cached_property
    def prefills(self) -> list[RequestSpan]:
        """Requests behind the decodes."""
        return self.requests.behind(self.num_decodes)

    @cached_property
    def decode_batch(self) -> SubBatch:
        """The decodes."""
        tokens = slice(0, self.num_decodes)
        most = 1, self.max_seq_len
        return self._sub_batch(0, self.num_decodes, tokens, *most, is_new=False, has_new=False)

    @_once
    def prefill_batches(self, least: int) -> list[SubBatch]:
        """The requests behind the decodes: with context, and behind them those without any.

        Args:
            least: tokens of the longest prompt without context that are worth a batch of their own.
        """
        prefills = self.prefills
        new = len(prefills)
        while new and prefills[new - 1].context_len == 0:
            new -= 1
        if max((each.query_len for each in prefills[new:]), default=0) < least:
            new = len(prefills)
        batches = []
        border = prefills[new].req_index if new < len(prefills) else len(self.requests)
        for some, start, stop, is_new in (
            (prefills[:new], self.num_decodes, border, False),
            (prefills[new:], border if new else self.num_decodes, len(self.requests), True),
        ):
            if some:
                most = max(each.query_len for each in some), max(each.seq_len for each in some)
                tokens = slice(some[0].start, some[-1].stop)
                has_new = any(each.context_len == 0 for each in some)
                batches.append(self._sub_batch(start, stop, tokens, *most, is_new, has_new))
        return batches

    def _sub_batch(
        self,
        start: int,
        stop: int,
        tokens: slice,
        max_query_len: int,
        max_seq_len: int,
        is_new: bool,
        has_new: bool,
    ) -> SubBatch:
        own, starts = slice(start, stop), self.query_start_loc[start : stop + 1]
        return SubBatch(
            start,
            tokens,
            starts - tokens.start if tokens.start else starts,
            max_query_len,
            max_seq_len,
            is_new,
            has_new,
            self.first_pages[own],
            self.block_table[own],
            self.seq_lens[own],
            None if self.local is None else self.local.block_table[own],
            {},
        )

    @_once
    def used_pages(self, start: int, stop: int, page: int) -> UsedPages:
        """All far pages of some requests, for layers that attend to copies of these pages.

        Args:
            start: the first request's place in the step.
            stop: behind the last one's.
            page: N, tokens of a page.
        """
        _, length = self.requests.lengths(start, stop)
        table = self.block_table[start:stop]
        return pages_between(table, length * 0, -(-length // page), 0, self._sent)

    @_once
    def used_local_pages(
        self, start: int, stop: int, page: int, recent: int, sinks: int
    ) -> UsedPages:
        """Local pages of some requests that new tokens see, and those of the new tokens.

        Args:
            start: the first request's place in the step.
            stop: behind the last one's.
            page: N, tokens of a local page.
            recent: w.
            sinks: s.
        """
        assert self.local is not None
        context, length = self.requests.lengths(start, stop)
        begin = np.maximum(context - recent + 1, 0) // page
        table = self.local.block_table[start:stop]
        first = sink_pages(sinks, page)
        return pages_between(table, begin, -(-length // page), first, self._sent)

    @_once
    def deciders(self, start: int, end: int, least: int) -> NewRequests | None:
        """`new` requests whose prompts have ``least`` tokens or more from ``start`` to ``end``.

        All together, with windows of one length; None if there are none.
        """
        some = [each for each in self.new if each.prompt_before(end) - start >= least]
        if not some:
            return None
        first = torch.tensor([each.start + start for each in some])
        count = torch.tensor([each.prompt_before(end) - start for each in some])
        window = first[:, None] + torch.arange(end - start).clamp_max(count[:, None] - 1)
        return NewRequests(self._pages_of(some), self._sent(window), self._sent(count.int()))

    @_once
    def undecided_pages(self, start: int, end: int, least: int) -> Tensor | None:
        """``[n]`` int32, first pages of `new` requests that are none of `deciders`, or None."""
        some = [each for each in self.new if each.prompt_before(end) - start < least]
        return self._pages_of(some) if some else None

    @_once
    def undecided_tokens(self, start: int, end: int, least: int) -> PackedTokens | None:
        """The first ``end`` tokens of undecided requests behind the decodes."""
        new = [each for each in self.new if each.req_index >= self.num_decodes]
        some = [each for each in new if each.prompt_before(end) - start < least]
        if not some:
            return None
        counts = [min(each.query_len, end) for each in some]
        tokens = [torch.arange(n) + each.start for each, n in zip(some, counts, strict=True)]
        return PackedTokens(
            self._sent(torch.tensor([each.req_index for each in some])),
            self._sent(torch.cat(tokens)),
            self._sent(torch.tensor([0, *accumulate(counts)], dtype=torch.int32)),
            max(counts),
        )

    @_once
    def begun_again(self, start: int, end: int, least: int) -> list[RequestSpan]:
        """`new` requests of `deciders` that bring more than a prompt that ends before ``end``.

        Preempted ones, which start anew with what they have generated.
        """
        return [
            r for r in self.new if start + least <= r.prompt_before(end) < min(end, r.query_len)
        ]

    def _pages_of(self, some: Sequence[RequestSpan]) -> Tensor:
        return self.first_pages[self._sent(torch.tensor([each.req_index for each in some]))]

    def _sent(self, host: Tensor) -> Tensor:
        """Bring a table to the device without waiting for it."""
        if self.first_pages.is_cuda:
            return host.pin_memory().to(self.first_pages.device, non_blocking=True)
        return host
