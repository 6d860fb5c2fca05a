"""A model over a cache of fixed size, whose steps are CUDA graphs where there is CUDA.

Plain and clustered models are run alike: a graph leaves out what Python takes to launch either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import StaticClusteredCache
from chai_attention.integrations.transformers.cache import CacheMemory, memory_of
from chai_attention.integrations.transformers.graphs import DecodeGraph
from chai_attention.profile import ClusterProfile


class StaticRunner:
    """Prompts in one forward, further tokens one by one in memory that does not move.

    A plain model reads its prompt into a cache that grows, because over a static one it would
    compute a mask and attend to empty places; its K and V are moved before the first step.

    Args:
        model: with ``profile`` enabled, if there is one.
        profile: clusters; None for the plain model.
        most_tokens: that a sequence will have.
    """

    steps = "mean of further tokens, each a replay of a CUDA graph over a cache of fixed size"

    def __init__(self, model: PreTrainedModel, profile: ClusterProfile | None, most_tokens: int):
        self._model = model
        self._profile = profile
        self._most = most_tokens
        self._cache: Any = None
        self._step: Any = None

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Read ``ids [B, S]`` into an empty cache; logits ``[B, V]`` of the last token."""
        self._renew()
        if self._profile is None:
            self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        elif self._cache is None:
            self._cache = StaticClusteredCache(self._model, self._profile, self._most)
        else:
            self._cache.reset()
        out: Any = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _renew(self) -> None:
        """A new prompt: what was captured of a plain model is of memory that is gone."""
        if self._profile is None:
            self._step = None

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Read ``token [B, 1]``; logits ``[B, V]``, which the next step overwrites."""
        if self._profile is not None and token.device.type != "cuda":
            out: Any = self._model(token, past_key_values=self._cache, use_cache=True)
            return out.logits[:, -1]
        if self._step is None:
            if self._profile is None:
                count = self._cache.get_seq_length()
                self._cache = moved(self._model, self._cache, self._most)
                self._step = _PlainStep(self._model, self._cache, count)
            else:
                self._step = DecodeGraph(self._model, self._cache)
        return self._step.step(token)[:, -1]

    def memory(self) -> CacheMemory:
        """What the cache holds."""
        if self._profile is not None:
            memory: CacheMemory = self._cache.memory()
            return memory
        return memory_of(self._cache)


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


class _PlainStep:
    """A step of a model without clusters; captured at the first call where there is CUDA."""

    def __init__(self, model: PreTrainedModel, cache: StaticCache, count: int):
        self._model = model
        self._cache = cache
        self._count = count
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, token: Tensor) -> Tensor:
        """Read ``token [B, 1]``; logits ``[B, 1, V]``."""
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
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._forward()
                self._rewind()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                self._logits = self._forward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"a step of {type(self._model).__name__} cannot be captured in a graph: {error}"
            ) from error
        self._rewind()
        self._graph = graph

    def _rewind(self) -> None:
        """Stand behind the tokens that count."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._count)

    def _forward(self) -> Tensor:
        mask = step_mask(self._model, self._positions, self._cache.layers[0].keys.shape[2])
        out: Any = self._model(
            self._ids, attention_mask=mask, position_ids=self._positions,
            past_key_values=self._cache, use_cache=True,
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits
