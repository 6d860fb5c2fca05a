"""The exact recent window in vLLM: K of removed heads near the end and at the start.

Pages hold K of representatives only. What every head needs of its own for the last tokens and
the first ones is kept per running request, in memory that is taken before vLLM plans its pages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence

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

    def restore(self) -> None:
        """Write anew what no request writes: vLLM's sleep may have dropped the memory's contents.

        K of requests stays as it is, as they may go on with other weights.
        """
        sinks = self.near.sink_positions
        sinks.copy_(torch.arange(sinks.shape[1], dtype=sinks.dtype))

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

    A request that goes on keeps its row, also through steps that it has no part in. A new one gets
    the row of one that has ended.

    Args:
        count: rows that there are: as many as requests can run at a time.
    """

    def __init__(self, count: int):
        self._row_of: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(count))[::-1]

    def rows(
        self, requests: Sequence[str], is_new: Sequence[bool], living: Container[str]
    ) -> list[int]:
        """Return the row of each request of a step.

        Args:
            requests: the name of each.
            is_new: whether it starts, or starts anew, with this step.
            living: names of all requests that have not ended, whether they run or wait.

        Raises:
            RuntimeError: a request that goes on is not known.
        """
        for name, new in zip(requests, is_new, strict=True):
            if name in self._row_of:
                self._row_of.move_to_end(name)
            elif not new:
                raise RuntimeError(
                    f"the recent window of request {name} was lost; please report this, with the "
                    "options vLLM was started with"
                )
        for name in requests:
            if name not in self._row_of:
                self._row_of[name] = self._take(living)
        return [self._row_of[name] for name in requests]

    def _take(self, living: Container[str]) -> int:
        """A row that nobody needs."""
        if not self._free:
            ended = [name for name in self._row_of if name not in living]
            self._free = [self._row_of.pop(name) for name in reversed(ended)]
        if not self._free:
            # somebody was preempted, and will start anew; vLLM lets nobody in ahead of those but
            # by priority (see `options.refuse`), so that they keep their rows
            self._free = [self._row_of.popitem(last=False)[1]]
        return self._free.pop()
