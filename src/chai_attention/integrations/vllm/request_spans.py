"""The requests of a step, in numbers of the host.

A step that decodes has hundreds of requests, and no layer asks about a single one. So they are
kept as arrays (`RequestSpans`), and one is described (`RequestSpan`) only when it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]


class RequestSpan(NamedTuple):
    """One request of a step, in numbers of the host.

    Attributes:
        req_index: its place in the step.
        start: its first token among those of the step.
        stop: behind its last one.
        context_len: tokens that stand in the cache already.
        prompt_len: tokens of its prompt; what comes behind them was generated, also where a
            preempted request starts anew with both.
    """

    req_index: int
    start: int
    stop: int
    context_len: int
    prompt_len: int

    @property
    def query_len(self) -> int:
        """New tokens."""
        return self.stop - self.start

    @property
    def seq_len(self) -> int:
        """All tokens, with the new ones."""
        return self.context_len + self.query_len

    def prompt_before(self, end: int) -> int:
        """New tokens of the prompt that stand before position ``end``; without any context."""
        return min(self.query_len, self.prompt_len, end)


class RequestSpans:
    """All requests of a step.

    Args:
        query_start_loc: ``[B + 1]``, where their tokens begin, and the end.
        seq_lens: ``[B]``, how many they then have.
        prompt_len: from a request's index to the tokens of its prompt, asked for requests without
            context; None if no layer needs it.
    """

    def __init__(
        self,
        query_start_loc: ArrayLike,
        seq_lens: ArrayLike,
        prompt_len: Callable[[int], int] | None = None,
    ):
        # vLLM writes the next step to the arrays of this one
        self._starts = np.array(query_start_loc, dtype=np.int64)
        self._seq_lens = np.array(seq_lens, dtype=np.int64)
        self._query_lens = np.diff(self._starts)
        self._prompt_len = prompt_len

    def __len__(self) -> int:
        return len(self._query_lens)

    def __getitem__(self, index: int) -> RequestSpan:
        start, new = int(self._starts[index]), int(self._query_lens[index])
        length = int(self._seq_lens[index])
        context = max(0, length - new)
        prompt = length
        if self._prompt_len is not None and not context and new:
            prompt = self._prompt_len(index)
        return RequestSpan(index, start, start + new, context, prompt)

    def __iter__(self) -> Iterator[RequestSpan]:
        return (self[index] for index in range(len(self)))

    def leading_decodes(self) -> int:
        """How many requests at the front have one new token each."""
        others = np.flatnonzero(self._query_lens != 1)
        return int(others[0]) if len(others) else len(self)

    def new(self) -> list[RequestSpan]:
        """Requests with new tokens and no context."""
        found = (self._query_lens > 0) & (self._seq_lens <= self._query_lens)
        return [self[index] for index in np.flatnonzero(found).tolist()]

    def lengths(self, start: int, stop: int) -> tuple[Counts, Counts]:
        """Tokens of some requests before the step, and with its own: zeros for those without any.

        Args:
            start: the first request.
            stop: behind the last one.
        """
        new = self._query_lens[start:stop]
        length = np.where(new > 0, self._seq_lens[start:stop], 0)
        return np.maximum(length - new, 0), length

    def behind(self, first: int) -> list[RequestSpan]:
        """Requests with new tokens, from an index on."""
        return [self[n + first] for n in np.flatnonzero(self._query_lens[first:] > 0).tolist()]
