"""What all clustered layers need to know about one step of vLLM, made once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """

    number: int
    start: int
    stop: int
    context: int

    @property
    def tokens(self) -> int:
        """New tokens."""
        return self.stop - self.start

    @property
    def length(self) -> int:
        """Tokens with the new ones."""
        return self.context + self.tokens


@dataclass(frozen=True)
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
        pages: ``[B]`` int32, first page of each request.
        token_pages: ``[T]`` int32, first page of each token's request.
        most_queries: no request has more new tokens.
        most_keys: no request has more tokens.
        is_capture: whether this is a dummy for a CUDA graph.
        slots: ``[B]`` int32, row of each request in the pools of the recent window, or None if
            there is no window. So are the next three.
        host_slots: the same on the host.
        token_slots: ``[T]`` int32, what `write_paged` calls ``near_rows``.
        positions: ``[T]`` int64, position of each token in its request.
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
    slots: Tensor | None = None
    host_slots: Sequence[int] | None = None
    token_slots: Tensor | None = None
    positions: Tensor | None = None

    @property
    def fresh(self) -> list[Row]:
        """Requests that start with this step."""
        if self.is_capture:
            return []
        return [row for row in self.rows if row.context == 0 and row.tokens]

    @cached_property
    def prefills(self) -> list[Row]:
        """Requests behind the decodes."""
        return [row for row in self.rows if row.number >= self.decodes and row.tokens]

    def first_tokens(self, rows: Sequence[Row], start: int, stop: int) -> Tensor:
        """Indices of the tokens ``start`` to ``stop`` of some fresh requests, ``[n, count]``."""
        begin = torch.tensor([row.start + start for row in rows])
        if self.pages.is_cuda:
            begin = begin.pin_memory().to(self.pages.device, non_blocking=True)
        return begin[:, None] + torch.arange(stop - start, device=begin.device)


def rows_of(query_starts: Sequence[int], lengths: Sequence[int]) -> list[Row]:
    """The requests of a step, from where their tokens begin and how many they then have."""
    return [
        Row(number, start, stop, max(0, length - (stop - start)))
        for number, (length, (start, stop)) in enumerate(
            zip(lengths, pairwise(query_starts), strict=False)
        )
    ]


def leading_decodes(rows: Sequence[Row]) -> int:
    """How many requests at the front have one new token each."""
    for count, row in enumerate(rows):
        if row.tokens != 1:
            return count
    return len(rows)
