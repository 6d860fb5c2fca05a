"""The requests of a step, in numbers of the host.

A step that decodes has hundreds of them, and nobody asks about a single one. So what is asked about
all is asked of arrays, and a request is described when it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


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


class Rows:
    """All requests of a step.

    Args:
        query_starts: ``[B + 1]``, where their tokens begin, and the end.
        lengths: ``[B]``, how many they then have.
        prompt_of: from a row to the tokens of its prompt, asked for requests without context; None
            where nobody needs to know.
    """

    def __init__(
        self,
        query_starts: ArrayLike,
        lengths: ArrayLike,
        prompt_of: Callable[[int], int] | None = None,
    ):
        # vLLM writes the next step to the arrays of this one
        self._starts = np.array(query_starts, dtype=np.int64)
        self._lengths = np.array(lengths, dtype=np.int64)
        self._tokens = np.diff(self._starts)
        self._prompt_of = prompt_of

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number: int) -> Row:
        start, tokens = int(self._starts[number]), int(self._tokens[number])
        length = int(self._lengths[number])
        context = max(0, length - tokens)
        prompt = length
        if self._prompt_of is not None and not context and tokens:
            prompt = self._prompt_of(number)
        return Row(number, start, start + tokens, context, prompt)

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def leading_decodes(self) -> int:
        """How many requests at the front have one new token each."""
        others = np.flatnonzero(self._tokens != 1)
        return int(others[0]) if len(others) else len(self)

    def fresh(self) -> list[Row]:
        """Requests with new tokens and no context."""
        found = (self._tokens > 0) & (self._lengths <= self._tokens)
        return [self[number] for number in np.flatnonzero(found).tolist()]

    def behind(self, first: int) -> list[Row]:
        """Requests with new tokens, from a row on."""
        return [self[n + first] for n in np.flatnonzero(self._tokens[first:] > 0).tolist()]
