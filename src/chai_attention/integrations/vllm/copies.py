"""Prompts read 8-bit pages through copies in the model's dtype, which matrix products take."""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.ops.narrow import widen_pages

# whose pages are copied at a time; prompts behind more read the pages themselves
MOST_TOKENS = 32768


def copied_tokens(batch_tokens: int, longest: int) -> int:
    """For how many tokens of pages there has to be room.

    Args:
        batch_tokens: of a step, vLLM's ``max_num_batched_tokens``.
        longest: of a request, its ``max_model_len``.
    """
    return min(batch_tokens + longest, MOST_TOKENS)


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
        shapes = [torch.Size((used.shape[0], *states.shape[1:])) for states in pages]
        end = shapes[0].numel()
        if end + shapes[1].numel() > self._memory.numel():
            return None
        keys = self._memory[:end].view(shapes[0])
        values = self._memory[end : end + shapes[1].numel()].view(shapes[1])
        widen_pages(pages[0], used, keys)
        widen_pages(pages[1], used, values)
        return keys, values
