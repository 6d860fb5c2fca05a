"""The exact recent window in vLLM: K of removed heads near the end and at the start.

Pages hold K of representatives only. What every head needs of its own for the last tokens and
the first ones is kept per running request, in memory that is taken before vLLM plans its pages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from chai_attention.integrations.vllm.layers import ServedLayer
from chai_attention.ops.ring import NearRing


class RecentPool:
    """One layer's memory for requests of `RequestSlots`.

    Args:
        layer: the layer; it has a recent window.
        requests: most requests that run at a time.
        head_dim: D.
        drafts: tokens that a step may take back (speculative decoding).
        dtype: of K.
        device: of the cache.
    """

    def __init__(
        self,
        layer: ServedLayer,
        requests: int,
        head_dim: int,
        drafts: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        plan = layer.plan
        removed = plan.kv_heads - layer.kept
        shape = (requests, removed)
        self.near = NearRing(
            torch.zeros(*shape, plan.recent + drafts, head_dim, dtype=dtype, device=device),
            torch.zeros(*shape, plan.sinks, head_dim, dtype=dtype, device=device),
            torch.arange(plan.sinks, dtype=torch.int32, device=device).repeat(requests, 1),
            plan.recent,
        )

    @property
    def size(self) -> int:
        """Tokens that the ring holds."""
        return self.near.ring.shape[2]

    def last(self, slot: int, past: int, count: int) -> Tensor:
        """K of removed heads, ``[1, removed, count, D]``, of tokens right before ``past``."""
        position = torch.arange(past - count, past, device=self.near.ring.device)
        return self.near.ring[slot : slot + 1].index_select(2, position % self.size)

    def first(self, slot: int, count: int) -> Tensor:
        """K of removed heads, ``[1, removed, count, D]``, of the first ``count`` tokens."""
        return self.near.sinks[slot : slot + 1, :, :count]


class RequestSlots:
    """Rows of the pools by request, for a model runner that does not number its requests.

    A request is known by its first page, which it shares with nobody (a recent window excludes
    prefix caching). Rows of requests that ended are taken over by others, the longest unused one
    first.

    Args:
        count: rows that there are.
    """

    def __init__(self, count: int):
        self.count = count
        self._row_of: OrderedDict[int, int] = OrderedDict()

    def rows(self, pages: Sequence[int], is_new: Sequence[bool]) -> list[int]:
        """Return the row of each request of a step.

        Args:
            pages: first page of each.
            is_new: whether it starts with this step.

        Raises:
            RuntimeError: a request that goes on is not known.
        """
        for page, new in zip(pages, is_new, strict=True):
            if page in self._row_of:
                self._row_of.move_to_end(page)
            elif not new:
                raise RuntimeError(
                    f"the recent window of the request with first page {page} was lost; please "
                    "report this, with the options vLLM was started with"
                )
        for page in pages:
            if page not in self._row_of:
                spare = len(self._row_of)
                row = self._row_of.popitem(last=False)[1] if spare == self.count else spare
                self._row_of[page] = row
        return [self._row_of[page] for page in pages]
