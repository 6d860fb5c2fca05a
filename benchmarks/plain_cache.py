"""The fused baseline of a decode step: a plain K,V cache of fixed size and torch's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin


class PlainLayer(CacheLayerMixin):
    """K and V of all heads in fixed memory, for decode steps at its end.

    Args:
        shape: ``[B, H, S, D]`` of both.
        dtype: of both.
        position: ``[1]``, where a step writes, on the device.
    """

    is_sliding = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, position: Tensor):
        super().__init__()
        made = {"dtype": dtype, "device": position.device}
        self.keys, self.values = (torch.empty(shape, **made) for _ in "kv")
        self.size, self.position = shape[2], position

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write one token and return everything."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the step."""
        return self.size - 1

    def get_max_length(self) -> int:
        """Capacity."""
        return self.size

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All keys are seen."""
        return self.size, 0


@contextmanager
def whole_cache_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention over the whole cache, without a mask."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
    ) -> Any:
        out = F.scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.5)
        return out.transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register("whole_cache", attend)
    AttentionMaskInterface.register("whole_cache", lambda *args, **kwargs: None)
    model.set_attn_implementation("whole_cache")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del AttentionInterface._global_mapping["whole_cache"]
        del AttentionMaskInterface._global_mapping["whole_cache"]


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Record a step after two runs of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
