"""What lies in a page of the K,V cache, and how large the pages of the exact window are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

PAGE_MULTIPLE = 16  # tokens; what the kernels need of a page
PAGE = 64  # tokens of a page on GPUs: with fewer the kernels look up pages more than they read them
# Prefixes are found again at multiples of both kinds of pages: not more than so many far pages
_MOST_ALIGNED = 4
_LONGEST = 2  # near pages hold no more than so many far ones, unless the window does


@dataclass(frozen=True)
class PageLayout:
    """The pages of one layer, far or near.

    A page of N tokens is one run of memory: ``[N, key_heads, D]`` of K and behind it
    ``[N, value_heads, Dv]`` of V. Far pages hold the heads that a membership keeps, in the order of
    its ``key_heads`` and ``value_heads``; near pages those that it removes, in the order of its
    ``removed_key_heads`` and ``removed_value_heads``.

    Attributes:
        key_heads: K heads that a page holds.
        value_heads: V heads that a page holds.
        head_dim: D.
        value_dim: Dv.
    """

    key_heads: int
    value_heads: int
    head_dim: int
    value_dim: int

    @property
    def numbers_per_token(self) -> int:
        """Numbers that a page holds for every token; at least one, as vLLM has no empty pages."""
        return max(1, self.key_heads * self.head_dim + self.value_heads * self.value_dim)

    def page_bytes(self, tokens: int, element_size: int) -> int:
        """Bytes of a page of ``tokens``."""
        return tokens * self.numbers_per_token * element_size

    def split(self, cache: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """View the K and V pages of a layer's cache.

        Args:
            cache: ``[P, 1, N, C]``, as vLLM hands it to attention; a page is one run of memory.
            start: numbers of a page, per token, that stand before the layer's.

        Returns:
            ``[P, N, key_heads, D]`` and ``[P, N, value_heads, Dv]``.
        """
        pages, tokens, stride = cache.shape[0], cache.shape[2], cache.stride(0)
        line, end = self.key_heads * self.head_dim, self.value_heads * self.value_dim
        first = cache.storage_offset() + tokens * start
        return (
            cache.as_strided(
                (pages, tokens, self.key_heads, self.head_dim),
                (stride, line, self.head_dim, 1),
                first,
            ),
            cache.as_strided(
                (pages, tokens, self.value_heads, self.value_dim),
                (stride, end, self.value_dim, 1),
                first + tokens * line,
            ),
        )


class Pages(NamedTuple):
    """A layer's pages in one step; nobody keeps them, as vLLM replaces caches.

    Attributes:
        key: ``[P, N, kept K heads, D]``.
        value: ``[P, N, kept V heads, Dv]``.
        near_key: ``[P, N', removed K heads, D]`` of near pages; None if far pages hold all heads.
        near_value: ``[P, N', removed V heads, Dv]``; the same.
    """

    key: Tensor
    value: Tensor
    near_key: Tensor | None = None
    near_value: Tensor | None = None


def near_page(page: int, far: int, near: int, recent: int) -> int:
    """Tokens of a near page beside far pages of ``page`` tokens.

    vLLM takes both from one store of blocks, so every block is as large as the larger of the two.
    Near pages are as long as they can be without being the larger ones; but 16 tokens at least,
    not much longer than the window or far pages, and so that prefixes can be found again at every
    fourth far page or more often.

    Args:
        page: tokens of a far page, a multiple of 16.
        far: numbers per token in the far pages of all layers together.
        near: the same of near pages.
        recent: w.
    """
    found = PAGE_MULTIPLE
    longest = min(page * far // max(1, near), max(_LONGEST * page, recent), _MOST_ALIGNED * page)
    for tokens in range(PAGE_MULTIPLE, longest + 1, PAGE_MULTIPLE):
        if math.lcm(tokens, page) <= _MOST_ALIGNED * page:
            found = tokens
    return found


def sink_pages(sinks: int, page: int) -> int:
    """Near pages of ``page`` tokens that hold a request's first ``sinks`` tokens."""
    return -(-sinks // page)


def near_pages_of(tokens: int, page: int, recent: int, sinks: int, new: int = 1) -> int:
    """Near pages that a request of ``tokens`` holds at most, while ``new`` of them are read.

    Args:
        tokens: with the new ones.
        page: tokens of a near page.
        recent: w.
        sinks: s.
        new: tokens of a step, all of whose near pages are there while it runs.
    """
    window = -(-(recent - 2 + new) // page) + 1  # it may begin anywhere in a page
    return min(-(-tokens // page), window + sink_pages(sinks, page))
