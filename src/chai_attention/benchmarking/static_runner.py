"""A model over a cache of fixed size, whose steps are CUDA graphs where there is CUDA.

Plain and clustered models run alike: a graph leaves out the time that Python takes to launch them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from chai_attention.benchmarking.correctness import ROUNDING
from chai_attention.benchmarking.plain_steps import PlainStep, moved, time_backends
from chai_attention.benchmarking.runners import Runner, time_steps
from chai_attention.integrations.transformers import StaticClusteredCache
from chai_attention.integrations.transformers.cache import CacheMemory
from chai_attention.integrations.transformers.graphs import DecodeGraph
from chai_attention.profile import ClusterProfile


class StaticRunner(Runner):
    """Prompts in one forward, further tokens one by one in memory that does not move.

    A plain model reads its prompt into a cache that grows, because over a static one it would
    compute a mask and attend to empty places; its K and V are moved before the first step.
    """

    steps = (
        "mean of further tokens, each a replay of a CUDA graph over a cache of fixed size; fused "
        "ones by the fastest of torch's backends"
    )

    def __init__(self, model: PreTrainedModel, profile: ClusterProfile | None, most_tokens: int):
        super().__init__(model, profile, most_tokens)
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
        return super().step(ids)

    def _renew(self) -> None:
        """A new prompt: what was captured of a plain model is of memory that is gone."""
        if self._profile is None:
            self._step = None

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Read ``token [B, 1]``; logits ``[B, V]``, which the next step overwrites."""
        if self._profile is None:
            if self._step is None:
                count = self._cache.get_seq_length()
                self._cache = moved(self._model, self._cache, self._most)
                self._step = PlainStep(self._model, self._cache, count)
            return self._step.step(token)
        if token.device.type != "cuda":
            return super().step(token)
        if self._step is None:
            self._step = DecodeGraph(self._model, self._cache)
        return self._step.step(token)[:, -1]

    def backends(self, ids: Tensor, new_tokens: int) -> dict[str, float]:
        """Microseconds of a plain model's step behind ``ids [B, S]``, by `time_backends`."""
        token = self.prefill(ids).argmax(-1, keepdim=True)
        want = self.step(token).clone()
        return time_backends(
            self._model, self._cache, token, want, ROUNDING[self._model.dtype],
            lambda step: time_steps(step, token, new_tokens),
        )  # fmt: skip

    def memory(self) -> CacheMemory:
        """What the cache holds."""
        if self._profile is None:
            return super().memory()
        memory: CacheMemory = self._cache.memory()
        return memory
