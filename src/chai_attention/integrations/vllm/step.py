"""What all clustered layers need to know about one step of vLLM, made once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One request of a step, in numbers of the host.

    Attributes:
        number: its row.
        start: its first token among those of the step.
        stop: behind its last one.
        context: tokens that stand in the cache already.
        prompt: tokens of its prompt; what comes behind them was generated, also where a preempted
            request starts anew with both.
    """

    number: int
    start: int
    stop: int
    context: int
    prompt: int

    @property
    def tokens(self) -> int:
        """New tokens."""
        return self.stop - self.start

    @property
    def length(self) -> int:
        """Tokens with the new ones."""
        return self.context + self.tokens

    def first(self, end: int) -> int:
        """New tokens of the prompt that stand before position ``end``; without any context."""
        return min(self.tokens, self.prompt, end)


class NearTables(NamedTuple):
    """Where the near K and V of a step's requests and of its new tokens stand.

    Attributes:
        block_table: ``[B, max_pages]`` int32, near pages; any number for those given back.
        slot_mapping: ``[T]`` int64, where each token goes in the near pages; -1 for padding.
    """

    block_table: Tensor
    slot_mapping: Tensor


class Beginners(NamedTuple):
    """Requests that start with a step, with equally many tokens of prompt in the probe window.

    Attributes:
        pages: ``[n]`` int32, the first page of each.
        window: ``[n, W]`` int64, the window's tokens among those of the step; W is 0 for prompts
            that end before the window starts.
    """

    pages: Tensor
    window: Tensor


@dataclass
class Step:
    """One forward of a batch; T tokens of B requests, packed.

    Attributes:
        rows: the requests. Rows that only pad a CUDA graph are among the first ``decodes``.
        tokens: T.
        decodes: so many leading requests have one token each, all others come behind them.
        query_starts: ``[B + 1]`` int32, where each request's tokens begin, and the end.
        lengths: ``[B]`` int32, tokens of each request with the new ones; 0 for padding.
        block_table: ``[B, max_pages]`` int32.
        slot_mapping: ``[T]`` int64, where each token goes in the pages; -1 for padding.
        pages: ``[B]`` int32, first page of each request; of any use where memberships depend on
            requests only, as is ``token_pages``.
        token_pages: ``[T]`` int32, first page of each token's request.
        most_queries: no request has more new tokens.
        most_keys: no request has more tokens.
        is_capture: whether this is a dummy for a CUDA graph.
        near: the near pages, which vLLM describes after all else; None without any.
    """

    rows: Sequence[Row]
    tokens: int
    decodes: int
    query_starts: Tensor
    lengths: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    pages: Tensor
    token_pages: Tensor
    most_queries: int
    most_keys: int
    is_capture: bool
    near: NearTables | None = None
    _beginners: dict[tuple[int, int], list[Beginners]] = field(default_factory=dict)
    _ending: dict[int, list[Row]] = field(default_factory=dict)
    _tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def fresh(self) -> list[Row]:
        """Requests that start with this step."""
        if self.is_capture:
            return []
        return [row for row in self.rows if row.context == 0 and row.tokens]

    @cached_property
    def prefills(self) -> list[Row]:
        """Requests behind the decodes."""
        return [row for row in self.rows if row.number >= self.decodes and row.tokens]

    @cached_property
    def prefill_starts(self) -> Tensor:
        """``[B - decodes + 1]`` int32: where the tokens of `prefills` begin, from their first."""
        return self.query_starts[self.decodes :] - self.prefills[0].start

    def prefill_pages(self, page: int) -> tuple[Tensor, Tensor]:
        """The pages of all requests behind the decodes, one after the other, and a block table.

        For layers that attend to copies of these pages. Made once for all of them.

        Args:
            page: N, tokens of a page.

        Returns:
            ``[n]`` int64 numbers of pages, and ``[B - decodes, most]`` int32 places among them.
        """
        if page not in self._tables:
            count = torch.tensor(
                [-(-row.length // page) if row.tokens else 0 for row in self.rows[self.decodes :]]
            )
            first = count.cumsum(0) - count
            row = torch.repeat_interleave(count)
            column = torch.arange(len(row)) - first[row]
            most = torch.arange(max(1, int(count.max())))
            table = (first[:, None] + most).clamp_max(max(0, len(row) - 1)).int()
            if self.pages.is_cuda:
                row, column, table = (
                    x.pin_memory().to(self.pages.device, non_blocking=True)
                    for x in (row, column, table)
                )
            self._tables[page] = self.block_table[row + self.decodes, column].long(), table
        return self._tables[page]

    def beginners(self, start: int, end: int) -> list[Beginners]:
        """`fresh` requests by the number of their prompts' tokens from ``start`` to ``end``.

        Made once for all layers, and brought to the device without waiting for it.
        """
        if (start, end) not in self._beginners:
            by_stop: dict[int, list[Row]] = {}
            for row in self.fresh:
                by_stop.setdefault(max(start, row.first(end)), []).append(row)
            self._beginners[start, end] = [
                self._begin(rows, start, stop) for stop, rows in by_stop.items()
            ]
        return self._beginners[start, end]

    def ending_before(self, end: int) -> list[Row]:
        """`prefills` that start with this step and bring less of their prompt than ``end`` tokens.

        Made once for all layers.
        """
        if end not in self._ending:
            self._ending[end] = [
                row for row in self.prefills if row.context == 0 and row.first(end) < end
            ]
        return self._ending[end]

    def _begin(self, rows: Sequence[Row], start: int, stop: int) -> Beginners:
        host = torch.tensor([[row.number, row.start + start] for row in rows])
        if self.pages.is_cuda:
            host = host.pin_memory().to(self.pages.device, non_blocking=True)
        token = torch.arange(stop - start, device=host.device)
        return Beginners(self.pages[host[:, 0]], host[:, 1:] + token)


def rows_of(
    query_starts: Sequence[int],
    lengths: Sequence[int],
    prompt_of: Callable[[int], int] | None = None,
) -> list[Row]:
    """The requests of a step.

    Args:
        query_starts: where their tokens begin, and the end.
        lengths: how many they then have.
        prompt_of: from a row to the tokens of its prompt, asked for requests without context; None
            where nobody needs to know.
    """
    rows = []
    for number, (length, (start, stop)) in enumerate(
        zip(lengths, pairwise(query_starts), strict=False)
    ):
        context = max(0, length - (stop - start))
        prompt = length
        if prompt_of is not None and not context and stop > start:
            prompt = prompt_of(number)
        rows.append(Row(number, start, stop, context, prompt))
    return rows


def leading_decodes(rows: Sequence[Row]) -> int:
    """How many requests at the front have one new token each."""
    for count, row in enumerate(rows):
        if row.tokens != 1:
            return count
    return len(rows)
