"""What lies in a page of the K,V cache: K of the kept heads, then V of all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PageLayout:
    """The pages of one layer.

    A page of N tokens is one run of memory: ``[N, kept, D]`` of K and behind it ``[N, G, Dv]`` of
    V. Both orders of heads are those of the request's membership.

    Attributes:
        kept: K heads that a page holds.
        kv_heads: G.
        head_dim: D.
        value_dim: Dv.
    """

    kept: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def numbers_per_token(self) -> int:
        """Numbers that a page holds for every token."""
        return self.kept * self.head_dim + self.kv_heads * self.value_dim

    def page_bytes(self, tokens: int, element_size: int) -> int:
        """Bytes of a page of ``tokens``."""
        return tokens * self.numbers_per_token * element_size

    def split(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """View the K and V pages of a layer's cache.

        Args:
            cache: ``[P, 1, N, numbers_per_token]``, as vLLM hands it to attention.

        Returns:
            ``[P, N, kept, D]`` and ``[P, N, G, Dv]``.
        """
        pages, tokens = cache.shape[0], cache.shape[2]
        line = cache.flatten(1)
        middle = tokens * self.kept * self.head_dim
        return (
            line[:, :middle].view(pages, tokens, self.kept, self.head_dim),
            line[:, middle:].view(pages, tokens, self.kv_heads, self.value_dim),
        )
