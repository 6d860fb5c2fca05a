"""Decode steps of a model without clusters over a cache of fixed size, by torch's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, StaticCache

from chai_attention.benchmarking.correctness import relative_error
from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.graphs import captured, capturing

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
UNMASKED = "chai_benchmark_unmasked"  # its name among transformers' attention functions
Step = Callable[[Tensor], Tensor]


def moved(model: PreTrainedModel, cache: DynamicCache, most_tokens: int) -> StaticCache:
    """Move K and V into a static cache, a layer at a time, so that no two caches are held."""
    static = StaticCache(model.config.get_text_config(decoder=True), most_tokens)
    for new, old in zip(static.layers, cache.layers, strict=True):
        assert old.keys is not None
        assert old.values is not None
        new.update(old.keys, old.values)
        old.keys = old.values = None
    return static


def step_mask(model: PreTrainedModel, positions: Tensor, capacity: int) -> Tensor:
    """Mask of a token per sequence over a static cache, ``[B, 1, 1, capacity]``.

    A model's own is made with numbers from the host, which a graph cannot hold.

    Args:
        model: with unfused attention, whose masks are added, or fused, with True for what is seen.
        positions: ``[B, 1]`` of the tokens.
        capacity: tokens that the cache has room for.
    """
    seen = torch.arange(capacity, device=positions.device) <= positions[:, None, :, None]
    if model.config._attn_implementation != "eager":
        return seen
    hidden = torch.finfo(model.dtype).min
    return torch.zeros_like(seen, dtype=model.dtype).masked_fill(~seen, hidden)


@contextmanager
def attending_to(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Attend to the first ``tokens`` places of a static cache, all of them, inside the block."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None = None, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        out = F.scaled_dot_product_attention(
            query, key[:, :, :tokens], value[:, :, :tokens], scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register(UNMASKED, attend)
    try:
        model.set_attn_implementation(UNMASKED)
        yield
    finally:
        model.set_attn_implementation(before)
        del AttentionInterface._global_mapping[UNMASKED]


def time_backends(
    model: PreTrainedModel, cache: StaticCache, token: Tensor, want: Tensor, allowed: float,
    time: Callable[[Step], float],
) -> dict[str, float]:  # fmt: skip
    """Time decode steps without a mask by each of torch's backends that can run them.

    A mask of the cache's empty places rules some of them out. Here a step sees the tokens up to its
    own and no mask; so do the steps behind it that are timed, which see a few tokens too few.

    Args:
        model: without clusters.
        cache: holds a prompt and ``token`` behind it, and has room for the steps.
        token: ``[B, 1]``, which the first step reads again.
        want: its logits ``[B, V]``.
        allowed: relative error of these; a backend with more is left out.
        time: microseconds of a step.
    """
    count, found = int(cache.get_seq_length()) - 1, {}
    for name, backend in BACKENDS.items():
        rewind(cache, count)
        made = PlainStep(model, cache, count, masked=False)
        with attending_to(model, count + 1), sdpa_kernel(backend):
            try:
                error = relative_error(made.step(token), want)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, UnsupportedModelError):  # each has its own limits
                continue
            if error <= allowed:
                found[name] = time(made.step)
    return found


def rewind(cache: StaticCache, count: int) -> None:
    """Stand behind the first ``count`` tokens."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(count)


class PlainStep:
    """A step of a model without clusters; captured at the first call where there is CUDA.

    Args:
        model: the model.
        cache: its cache.
        count: tokens that the cache holds.
        masked: whether attention gets a mask of the cache's empty places.
    """

    def __init__(
        self, model: PreTrainedModel, cache: StaticCache, count: int, *, masked: bool = True
    ):
        self._model = model
        self._cache = cache
        self._count = count
        self._masked = masked
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, token: Tensor) -> Tensor:
        """Read ``token [B, 1]``; logits ``[B, V]``."""
        if token.device.type != "cuda":
            self._ids, self._positions = token, torch.full_like(token, self._count)
            self._count += 1
            return self._forward()
        if self._graph is None:
            self._capture(token)
        assert self._graph is not None
        self._ids.copy_(token)
        self._positions.fill_(self._count)
        self._graph.replay()
        self._count += 1
        return self._logits

    def _capture(self, token: Tensor) -> None:
        """Record a step; what it writes on the way is overwritten by the real one."""
        self._ids, self._positions = token.clone(), torch.full_like(token, self._count)
        with capturing(f"a step of {type(self._model).__name__}"):
            graph, self._logits = captured(self._forward, lambda: rewind(self._cache, self._count))
        rewind(self._cache, self._count)
        self._graph = graph

    def _forward(self) -> Tensor:
        mask = None
        if self._masked:
            mask = step_mask(self._model, self._positions, self._cache.layers[0].keys.shape[2])
        out: Any = self._model(
            self._ids, attention_mask=mask, position_ids=self._positions,
            past_key_values=self._cache, use_cache=True,
        )  # fmt: skip
        logits: Tensor = out.logits[:, -1]
        return logits
