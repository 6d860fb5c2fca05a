"""Copies of 8-bit pages in the model's dtype, which the kernels for prompts take.

Matrix products of prompts read every key once for each tile of queries, so that it pays to widen
pages once before. Decode reads them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chai_attention.integrations.vllm.layers import LayerShard, PageLayout, Pages, local_pages_of
from chai_attention.integrations.vllm.request_spans import Counts
from chai_attention.ops.fp8 import widen_pages

# queries of the longest chunk that are worth copies: those of the largest tiles
LEAST_QUERIES = 65
# tokens whose 8-bit pages are copied at a time; prompts behind more read the pages themselves
MOST_COPIED = 32768
MOST_REQUESTS = 16  # whose windows are copied at a time; local pages of more may find no room


def workspace_tokens(batch_tokens: int, longest: int) -> int:
    """For how many tokens of far pages the workspace has room.

    Args:
        batch_tokens: of a step, vLLM's ``max_num_batched_tokens``.
        longest: of a request, its ``max_model_len``.
    """
    return min(batch_tokens + longest, MOST_COPIED)


def workspace_numbers(
    layer: LayerShard,
    head_dim: int,
    value_dim: int,
    batch_tokens: int,
    longest: int,
    local_page: int,
    drafts: int = 0,
) -> int:
    """For how many numbers the workspace has room, for a layer's far and local pages.

    Args:
        layer: the layer.
        head_dim: D.
        value_dim: Dv.
        batch_tokens: as of `workspace_tokens`.
        longest: the same.
        local_page: tokens of a local page.
        drafts: as of `DequantisationWorkspace`.
    """
    tokens = workspace_tokens(batch_tokens, longest)
    far = tokens * layer.layout(head_dim, value_dim).numbers_per_token
    layout, plan = layer.local_layout(head_dim, value_dim), layer.plan
    if layout is None:
        return far
    # a step's new tokens, and the window of each request before them, begun and ended in a page
    window = local_pages_of(longest, local_page, plan.recent + drafts, plan.sinks) + 1
    pages = -(-min(batch_tokens, tokens) // local_page) + MOST_REQUESTS * window
    return far + pages * local_page * layout.numbers_per_token


class UsedPages(NamedTuple):
    """Pages that some requests of a step read, one request's after the other's.

    Attributes:
        pages: ``[n]`` int64, their numbers.
        block_table: ``[B', max_pages]`` int32, where each request's pages are among these; any of
            them for pages that are not read.
    """

    pages: Tensor
    block_table: Tensor


def pages_between(
    table: Tensor,
    begin: Counts,
    end: Counts,
    first: int,
    send: Callable[[Tensor], Tensor],
) -> UsedPages:
    """Each request's first pages, and those from ``begin`` to ``end``; by its block table.

    Args:
        table: ``[B', max_pages]`` int32, the requests' block table.
        begin: ``[B']``, of each request.
        end: the same.
        first: pages that are read, too, if they lie before.
        send: brings a table to the device.
    """
    lead = np.minimum(first, begin)
    skipped, count = begin - lead, lead + end - begin
    place = count.cumsum() - count  # of each request's first page
    row = np.repeat(np.arange(len(count)), count)
    index = np.arange(len(row)) - place[row]
    column = index + np.where(index < lead[row], 0, skipped[row])
    every = np.arange(max(1, int(end.max(initial=0))))
    there = np.where(every < lead[:, None], every, every - skipped[:, None])
    places = np.clip(place[:, None] + there, 0, max(0, len(row) - 1)).astype(np.int32)
    at = (send(torch.from_numpy(x)) for x in (row, column))
    return UsedPages(table[tuple(at)].long(), send(torch.from_numpy(places)))


class DequantisationWorkspace:
    """Memory for copies of 8-bit pages in the model's dtype.

    The layers of a model use it one after the other. It is taken before vLLM plans its pages.

    Args:
        dtype: of the copies.
        device: of the cache.
        drafts: by how many tokens the host may take a request for longer than it is, as it does
            not know yet which of its draft tokens were accepted.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, drafts: int = 0):
        self.drafts = drafts
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, numbers: int) -> None:
        """Take memory for so many numbers (`workspace_numbers`)."""
        if self._memory.numel() < numbers:
            self._memory = self._memory.new_empty(numbers)

    def widen(self, pages: Pages, far: UsedPages, local: UsedPages | None) -> Pages | None:
        """Copy pages in the wider dtype: far ones by a launch, and local ones by another.

        Args:
            pages: a layer's, as `PageLayout.split` views them: V of a page stands behind its K.
            far: which far pages.
            local: which local ones; None for none.

        Returns:
            The copies, where the block tables of ``far`` and ``local`` say; None where there is no
            room for so many.
        """
        held = [(pages.key, pages.value, far)]
        if local is not None and pages.local_key is not None and pages.local_value is not None:
            held.append((pages.local_key, pages.local_value, local))
        layouts = [
            PageLayout(key.shape[2], value.shape[2], key.shape[3], value.shape[3])
            for key, value, _ in held
        ]
        # a layer whose heads all stream holds nothing in far pages
        widths = [prod(key.shape[1:]) + prod(value.shape[1:]) for key, value, _ in held]
        ends = [width * used.pages.shape[0] for width, (*_, used) in zip(widths, held, strict=True)]
        if sum(ends) > self._memory.numel():
            return None
        copies: list[tuple[Tensor, Tensor]] = []
        start = 0
        for (key, _, used), layout, width, size in zip(held, layouts, widths, ends, strict=True):
            room, start = self._memory[start : start + size], start + size
            count, page = used.pages.shape[0], key.shape[1]
            run = key.as_strided((key.shape[0], width), (key.stride(0), 1))
            widen_pages(run, used.pages, room.view(count, width))
            copies.append(layout.split(room.view(count, 1, page, width // page)))
        return Pages(*copies[0], *copies[1]) if len(copies) > 1 else Pages(*copies[0])
