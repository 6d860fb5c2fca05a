"""Run a model over a prompt and further tokens, as ``chai bench model`` times it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.benchmarking.timing import Timing, summary
from chai_attention.integrations.transformers.cache import CacheMemory, memory_of
from chai_attention.integrations.transformers.devices import on_several_devices
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe

LEAST_PROMPTS, MOST_PROMPTS = 3, 20


class Runner:
    """A model as ``generate()`` runs it: a cache that grows, and no graph.

    Args:
        model: with ``profile`` enabled, if there is one.
        profile: its clusters; None for the plain model.
        most_tokens: that a sequence will have, new ones included.

    Attributes:
        steps: how further tokens are computed, for the report.
    """

    steps = "mean of further forwards with a cache that grows"

    def __init__(self, model: PreTrainedModel, profile: ClusterProfile | None, most_tokens: int):
        self._model, self._profile, self._most = model, profile, most_tokens
        self._cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        """Read ``ids [B, S]`` into an empty cache; logits ``[B, V]`` of the last token."""
        self._cache = None
        return self.step(ids)

    def step(self, token: Tensor) -> Tensor:
        """Read ``token [B, 1]``; logits ``[B, V]``, which the next step may overwrite."""
        out: Any = self._model(token, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    def memory(self) -> CacheMemory:
        """What the cache holds."""
        return memory_of(self._cache)


def make_runner(model: PreTrainedModel, profile: ClusterProfile | None, most_tokens: int) -> Runner:
    """Return the fastest way to run a model where it is; arguments as of `Runner`."""
    from chai_attention.benchmarking.split_steps import SplitRunner
    from chai_attention.benchmarking.static_runner import StaticRunner

    if model.device.type != "cuda" or not all(describe(model).clusterable):
        return Runner(model, profile, most_tokens)  # sliding windows cannot be captured in a graph
    kind = SplitRunner if on_several_devices(model) else StaticRunner
    return kind(model, profile, most_tokens)


class Speed(NamedTuple):
    """Times of one run.

    Attributes:
        ttft: of a prompt.
        tpot_us: microseconds of each further token, mean.
    """

    ttft: Timing
    tpot_us: float


def measure_speed(runner: Runner, ids: Tensor, new_tokens: int, seconds: float) -> Speed:
    """Time prompts, then further tokens behind the last of them.

    Args:
        runner: the model.
        ids: ``[B, S]``.
        new_tokens: how many further tokens are timed together.
        seconds: how long to repeat the prompt; three times in any case.
    """
    runner.prefill(ids)  # compiles, allocates
    wait_for(ids)
    times: list[float] = []
    end = time.perf_counter() + seconds
    logits = None
    while len(times) < LEAST_PROMPTS or (time.perf_counter() < end and len(times) < MOST_PROMPTS):
        start = time.perf_counter()
        logits = runner.prefill(ids)
        wait_for(ids)
        times.append((time.perf_counter() - start) * 1e6)
    assert logits is not None
    token = runner.step(logits.argmax(-1, keepdim=True)).argmax(-1, keepdim=True)
    return Speed(summary(times), time_steps(runner.step, token, new_tokens))


def time_steps(step: Callable[[Tensor], Tensor], token: Tensor, count: int) -> float:
    """Microseconds of a step, the mean of ``count`` behind ``token [B, 1]``."""
    wait_for(token)
    start = time.perf_counter()
    for _ in range(count):
        token = step(token).argmax(-1, keepdim=True)  # nothing is read on the host
    wait_for(token)
    return (time.perf_counter() - start) * 1e6 / count


def wait_for(tensor: Tensor) -> None:
    """Return when all devices of a tensor's kind have done what they were given."""
    for index in range(torch.cuda.device_count() if tensor.is_cuda else 0):
        torch.cuda.synchronize(index)
