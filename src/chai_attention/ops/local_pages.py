"""An exact recent window over pages: local K and V of removed heads stand in pages of their own.

A server keeps two kinds of pages. *Far pages* hold K and V of the kept heads for all tokens. *Local
pages* hold K of the removed heads, and V of heads that stream, for tokens that are still local
to a query: the last *w* and the first *s*, the sinks. Pages that lie wholly between them are given
back.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True, eq=False)
class LocalPages:
    """K and V that far pages do not hold, near the end and at the start of every sequence.

    Position p of a sequence stands in page ``block_table[b, p // N]``, at ``p % N``.

    Attributes:
        key: ``[P, N, G - kept_keys, D]`` in the order of ``membership.removed_key_heads``; any
            strides but the last; of the far pages' dtype.
        value: ``[P, N, G - kept_values, Dv]`` in that of ``membership.removed_value_heads``, the
            same; no heads where no V head streams.
        block_table: ``[B, max_pages]`` int32, the pages of each sequence. What lies before the
            window, but for the sinks, is not read: any number may stand for such a page.
        recent: w, last keys that every head sees with its own scores; the query's own is one.
        sinks: s, first keys that it does.
    """

    key: Tensor
    value: Tensor
    block_table: Tensor
    recent: int
    sinks: int

    @property
    def page(self) -> int:
        """N, tokens of a page."""
        return self.key.shape[1]
