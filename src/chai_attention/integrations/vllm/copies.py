"""Prompts read 8-bit pages through copies in the model's dtype, which matrix products take."""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.ops.narrow import widen_pages

MOST_TOKENS = (
    32768  # whose pages are copied at a time; prompts behind more read the pages themselves
)


class PageCopies:
    """Memory for copies of pages, which the layers of a model use one after the other.

    It is taken before vLLM plans its pages.

    Args:
        tokens: room for the pages of so many.
        dtype: of the copies.
        device: of the cache.
    """

    def __init__(self, tokens: int, dtype: torch.dtype, device: torch.device):
        self._tokens = tokens
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, numbers: int) -> None:
        """Take memory for a layer whose pages hold so many numbers per token."""
        if self._memory.numel() < self._tokens * numbers:
            self._memory = self._memory.new_empty(self._tokens * numbers)

    def of(self, pages: tuple[Tensor, Tensor], used: Tensor) -> tuple[Tensor, Tensor] | None:
        """Copy pages of K and V.

        Args:
            pages: ``[P, N, heads, D]`` each.
            used: ``[n]`` int64, which of them.

        Returns:
            ``[n, N, heads, D]`` each; None where there is no room for so many.
        """
        shapes = [(used.shape[0], *states.shape[1:]) for states in pages]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        if sum(sizes) > self._memory.numel():
            return None
        parts = self._memory[: sum(sizes)].split(sizes)
        for states, part, shape in zip(pages, parts, shapes, strict=True):
            widen_pages(states, used, part.view(shape))
        return parts[0].view(shapes[0]), parts[1].view(shapes[1])
