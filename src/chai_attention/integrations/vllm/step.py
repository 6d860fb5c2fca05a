"""What all clustered layers need to know about one step of vLLM, made once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chai_attention.integrations.vllm.step_rows import Row, Rows


class NearTables(NamedTuple):
    """Where the near K and V of a step's requests and of its new tokens stand.

    Attributes:
        block_table: ``[B, max_pages]`` int32, near pages; any number for those given back.
        slot_mapping: ``[T]`` int64, where each token goes in the near pages; -1 for padding.
    """

    block_table: Tensor
    slot_mapping: Tensor


class Part(NamedTuple):
    """Neighbouring requests of a step that one operation attends with.

    Attributes:
        tokens: theirs among those of the step.
        query_starts: ``[n + 1]`` int32, where each request's tokens begin, from the first one of
            the part, and the end.
        most_queries: no request has more new tokens.
        fresh: whether none has context.
        begins: whether some has none.
        pages: ``[n]`` int32, as in `Step`, as are the next three.
        block_table: ``[n, max_pages]`` int32.
        lengths: ``[n]`` int32.
        near_table: ``[n, max_near_pages]`` int32, None without near pages.
    """

    tokens: slice
    query_starts: Tensor
    most_queries: int
    fresh: bool
    begins: bool
    pages: Tensor
    block_table: Tensor
    lengths: Tensor
    near_table: Tensor | None


class Beginners(NamedTuple):
    """Requests that start with a step, and their prompts' tokens in the probe window.

    Attributes:
        pages: ``[n]`` int32, the first page of each.
        window: ``[n, W]`` int64, the window's tokens among those of the step; W is 0 for prompts
            that end before the window starts.
        real: ``[n]`` int32, how many of them are there; a prompt that ends in the window has
            others of its tokens behind them.
    """

    pages: Tensor
    window: Tensor
    real: Tensor


class Packed(NamedTuple):
    """Some requests' first tokens, one request after the other.

    Attributes:
        rows: ``[n]`` int64, the requests.
        tokens: ``[T']`` int64, their tokens among those of the step.
        starts: ``[n + 1]`` int32, where each request's begin, and the end.
        most: no request has more.
    """

    rows: Tensor
    tokens: Tensor
    starts: Tensor
    most: int


@dataclass(eq=False)
class Step:
    """One forward of a batch; T tokens of B requests, packed.

    What several layers derive from it is made once.

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

    rows: Rows
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
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def _once(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """What all layers that ask with these arguments share."""
        key = make, *arguments
        if key not in self._made:
            self._made[key] = make(*arguments)
        return self._made[key]

    @cached_property
    def fresh(self) -> list[Row]:
        """Requests that start with this step."""
        return [] if self.is_capture else self.rows.fresh()

    @cached_property
    def prefills(self) -> list[Row]:
        """Requests behind the decodes."""
        return self.rows.behind(self.decodes)

    @cached_property
    def decoding(self) -> Part:
        """The decodes."""
        tokens = slice(0, self.decodes)
        starts = self.query_starts[: self.decodes + 1]
        return self._part(0, self.decodes, tokens, starts, 1, fresh=False, begins=False)

    def prefilling(self, least: int | None) -> list[Part]:
        """The requests behind the decodes: with context, and behind them those without any.

        Args:
            least: tokens of the longest prompt without context that are worth a part of their own;
                None for one part of all.
        """
        found: list[Part] = self._once(self._prefilling, least)
        return found

    def _prefilling(self, least: int | None) -> list[Part]:
        rows = self.prefills
        fresh = len(rows)
        while fresh and rows[fresh - 1].context == 0:
            fresh -= 1
        if least is None or max((row.tokens for row in rows[fresh:]), default=0) < least:
            fresh = len(rows)
        parts = []
        border = rows[fresh].number if fresh < len(rows) else len(self.rows)
        for some, start, stop, is_fresh in (
            (rows[:fresh], self.decodes, border, False),
            (rows[fresh:], border if fresh else self.decodes, len(self.rows), True),
        ):
            if some:
                starts = self.query_starts[start : stop + 1] - some[0].start
                most = max(row.tokens for row in some)
                tokens = slice(some[0].start, some[-1].stop)
                begins = any(row.context == 0 for row in some)
                parts.append(self._part(start, stop, tokens, starts, most, is_fresh, begins))
        return parts

    def _part(
        self,
        start: int,
        stop: int,
        tokens: slice,
        starts: Tensor,
        most: int,
        fresh: bool,
        begins: bool,
    ) -> Part:
        rows = slice(start, stop)
        return Part(
            tokens,
            starts,
            most,
            fresh,
            begins,
            self.pages[rows],
            self.block_table[rows],
            self.lengths[rows],
            None if self.near is None else self.near.block_table[rows],
        )

    def prefill_pages(self, page: int) -> tuple[Tensor, Tensor]:
        """The pages of all requests behind the decodes, one after the other, and a block table.

        For layers that attend to copies of these pages.

        Args:
            page: N, tokens of a page.

        Returns:
            ``[n]`` int64 numbers of pages, and ``[B - decodes, most]`` int32 places among them.
        """
        found: tuple[Tensor, Tensor] = self._once(self._prefill_pages, page)
        return found

    def _prefill_pages(self, page: int) -> tuple[Tensor, Tensor]:
        count = torch.tensor(
            [
                -(-row.length // page) if row.tokens else 0
                for row in (self.rows[number] for number in range(self.decodes, len(self.rows)))
            ]
        )
        first = count.cumsum(0) - count
        row = torch.repeat_interleave(count)
        column = torch.arange(len(row)) - first[row]
        most = torch.arange(max(1, int(count.max())))
        table = (first[:, None] + most).clamp_max(max(0, len(row) - 1)).int()
        row, column, table = (self._sent(x) for x in (row, column, table))
        return self.block_table[row + self.decodes, column].long(), table

    def beginners(self, start: int, end: int) -> list[Beginners]:
        """`fresh` requests by the number of their prompts' tokens from ``start`` to ``end``."""
        found: list[Beginners] = self._once(self._beginners, start, end)
        return found

    def _beginners(self, start: int, end: int) -> list[Beginners]:
        by_stop: dict[int, list[Row]] = {}
        for row in self.fresh:
            by_stop.setdefault(max(start, row.first(end)), []).append(row)
        return [
            Beginners(
                self._pages_of(rows),
                self._sent(
                    torch.tensor([row.start + start for row in rows])[:, None]
                    + torch.arange(stop - start)
                ),
                self._sent(torch.full((len(rows),), stop - start, dtype=torch.int32)),
            )
            for stop, rows in by_stop.items()
        ]

    def deciders(self, start: int, end: int, least: int) -> Beginners | None:
        """`fresh` requests whose prompts have ``least`` tokens or more from ``start`` to ``end``.

        All together, with windows of one length; None if there are none.
        """
        found: Beginners | None = self._once(self._deciders, start, end, least)
        return found

    def _deciders(self, start: int, end: int, least: int) -> Beginners | None:
        rows = [row for row in self.fresh if row.first(end) - start >= least]
        if not rows:
            return None
        first, count = torch.tensor([[row.start + start, row.first(end) - start] for row in rows]).T
        token = torch.arange(end - start)
        window = first[:, None] + token.clamp_max(count[:, None] - 1)
        return Beginners(self._pages_of(rows), self._sent(window), self._sent(count.int()))

    def undecided_pages(self, start: int, end: int, least: int) -> Tensor | None:
        """``[n]`` int32, first pages of `fresh` requests that are none of `deciders`, or None."""
        found: Tensor | None = self._once(self._undecided_pages, start, end, least)
        return found

    def _undecided_pages(self, start: int, end: int, least: int) -> Tensor | None:
        rows = [row for row in self.fresh if row.first(end) - start < least]
        return self._pages_of(rows) if rows else None

    def undecided_tokens(self, start: int, end: int, least: int) -> Packed | None:
        """The first ``end`` tokens of `undecided` requests behind the decodes."""
        found: Packed | None = self._once(self._undecided_tokens, start, end, least)
        return found

    def _undecided_tokens(self, start: int, end: int, least: int) -> Packed | None:
        fresh = [row for row in self.fresh if row.number >= self.decodes]
        rows = [row for row in fresh if row.first(end) - start < least]
        if not rows:
            return None
        counts = [min(row.tokens, end) for row in rows]
        tokens = [torch.arange(n) + row.start for row, n in zip(rows, counts, strict=True)]
        return Packed(
            self._sent(torch.tensor([row.number for row in rows])),
            self._sent(torch.cat(tokens)),
            self._sent(torch.tensor([0, *accumulate(counts)], dtype=torch.int32)),
            max(counts),
        )

    def begun_again(self, start: int, end: int, least: int) -> list[Row]:
        """`fresh` requests of `deciders` that bring more than a prompt that ends before ``end``.

        Preempted ones, which start anew with what they have generated.
        """
        found: list[Row] = self._once(self._begun_again, start, end, least)
        return found

    def _begun_again(self, start: int, end: int, least: int) -> list[Row]:
        return [row for row in self.fresh if start + least <= row.first(end) < min(end, row.tokens)]

    def _pages_of(self, rows: Sequence[Row]) -> Tensor:
        return self.pages[self._sent(torch.tensor([row.number for row in rows]))]

    def _sent(self, host: Tensor) -> Tensor:
        """Bring a table to the device without waiting for it."""
        if self.pages.is_cuda:
            return host.pin_memory().to(self.pages.device, non_blocking=True)
        return host
