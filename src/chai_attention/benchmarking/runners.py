"""How a model reads a prompt and writes tokens: what ``chai bench model`` times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.benchmarking.timing import Timing, summary
from chai_attention.integrations.transformers.cache import CacheMemory, memory_of
from chai_attention.integrations.transformers.devices import on_several_devices
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe

LEAST_PROMPTS, MOST_PROMPTS = 3, 20


class Runner(Protocol):
    """A model with its cache."""

    @property
    def steps(self) -> str:
        """How steps run, for the report."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Read ``ids [B, S]`` into an empty cache; logits ``[B, V]`` of the last token."""

    def step(self, token: Tensor) -> Tensor:
        """Read ``token [B, 1]``; logits ``[B, V]``."""

    def memory(self) -> CacheMemory:
        """What the cache holds."""


def make_runner(model: PreTrainedModel, profile: ClusterProfile | None, most_tokens: int) -> Runner:
    """Return the fastest way to run a model where it is.

    Args:
        model: with ``profile`` enabled, if there is one.
        profile: its clusters.
        most_tokens: that a sequence will have, new ones included.
    """
    whole = all(describe(model).clusterable)  # sliding windows cannot be captured in a graph
    if model.device.type == "cuda" and whole and on_several_devices(model):
        from chai_attention.benchmarking.split_steps import SplitRunner

        return SplitRunner(model, profile, most_tokens)
    if model.device.type == "cuda" and whole:
        from chai_attention.benchmarking.static_runner import StaticRunner

        return StaticRunner(model, profile, most_tokens)
    return DynamicRunner(model)


class DynamicRunner:
    """A model as ``generate()`` runs it: a cache that grows, and no graph."""

    steps = "mean of further forwards with a cache that grows"

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        """Read ``ids [B, S]``; logits ``[B, V]`` of the last token."""
        self._cache = None
        return self._forward(ids)

    def step(self, token: Tensor) -> Tensor:
        """Read ``token [B, 1]``; logits ``[B, V]``."""
        return self._forward(token)

    def memory(self) -> CacheMemory:
        """What the cache holds."""
        return memory_of(self._cache)

    def _forward(self, ids: Tensor) -> Tensor:
        out: Any = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


class Speed(NamedTuple):
    """Times of one run.

    Attributes:
        ttft: of a prompt.
        tpot_us: microseconds of each further token, mean.
    """

    ttft: Timing
    tpot_us: float


def measure_speed(
    runner: Runner, ids: Tensor, new_tokens: int, seconds: float, wait: Callable[[], None]
) -> Speed:
    """Time prompts, then further tokens behind the last of them.

    Args:
        runner: the model.
        ids: ``[B, S]``.
        new_tokens: how many further tokens are timed together.
        seconds: how long to repeat the prompt; three times in any case.
        wait: returns when the device has done all that it was given.
    """
    runner.prefill(ids)  # compiles, allocates
    wait()
    times: list[float] = []
    end = time.perf_counter() + seconds
    logits = None
    while len(times) < LEAST_PROMPTS or (time.perf_counter() < end and len(times) < MOST_PROMPTS):
        start = time.perf_counter()
        logits = runner.prefill(ids)
        wait()
        times.append((time.perf_counter() - start) * 1e6)
    assert logits is not None
    token = runner.step(logits.argmax(-1, keepdim=True)).argmax(-1, keepdim=True)
    return Speed(summary(times), time_steps(runner.step, token, new_tokens, wait))


def time_steps(
    step: Callable[[Tensor], Tensor], token: Tensor, count: int, wait: Callable[[], None]
) -> float:
    """Microseconds of a step, the mean of ``count`` behind ``token [B, 1]``."""
    wait()
    start = time.perf_counter()
    for _ in range(count):
        token = step(token).argmax(-1, keepdim=True)  # nothing is read on the host
    wait()
    return (time.perf_counter() - start) * 1e6 / count


def wait_for(device: str) -> Callable[[], None]:
    """Return the function that waits for a device; of several GPUs, for all of them."""
    return _wait_for_gpus if device == "cuda" else lambda: None


def _wait_for_gpus() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
