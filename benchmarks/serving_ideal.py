"""What a workload of the serving benchmark could gain at best: bytes of steps, work of prompts.

A step of decoding reads all weights and the K and V of its requests once. A prompt is multiplied
with the weights, and its attention multiplies Q, K, probabilities and V. Both sides of a comparison
run at the same bytes and operations per second; nothing else takes time. Loads mix prompts and
decodes, so what they could gain depends on these rates, too.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from serving_kinds import Kind, Shape

Lengths = Sequence[tuple[int, int]]


class Rates(NamedTuple):
    """How fast a GPU is; `serving_rates` measures it.

    Attributes:
        bytes_s: bytes that it reads from its memory in a second.
        operations_s: operations of 16-bit matrix products that it does in a second, under load.
    """

    bytes_s: float
    operations_s: float


H100 = Rates(3.0e12, 6.0e14)  # about what kernels reach on it; for results that have no rates


@dataclass(frozen=True)
class Ideal:
    """Times of one engine if only bytes and operations took time.

    Attributes:
        shape: the model's.
        kind: what the engine does with its heads.
        ranks: GPUs, whose bytes and operations are counted together.
        rates: of one GPU, the same for all that is compared: ratios of times mean something.
    """

    shape: Shape
    kind: Kind
    ranks: int = 1
    rates: Rates = H100

    @property
    def _element(self) -> int:
        return 1 if self.kind.cache_dtype == "fp8" else 2

    @cached_property
    def _layers(self) -> Counter[tuple[int, int]]:
        """Query heads with scores of their own, and those that stream: how many layers."""
        return Counter(self.kind.layers(self.shape, self.ranks))

    def kept(self, own: int, streaming: int) -> tuple[int, int]:
        """K heads and V heads of a layer that are kept for all tokens."""
        group = self.shape.heads // self.shape.kv_heads
        return own // group, (self.shape.heads - streaming) // group

    @cached_property
    def _numbers(self) -> tuple[int, int]:
        """Heads of K and V of all layers that are kept for all tokens, and all others."""
        far = sum(count * sum(self.kept(*layer)) for layer, count in self._layers.items())
        return far, 2 * self.shape.layers * self.shape.kv_heads - far

    def cache_bytes(self, length: int) -> float:
        """K and V of one request."""
        far, others = self._numbers
        local = min(length, self.kind.recent + self.kind.sinks)
        return self.shape.head_dim * self._element * (far * length + others * local)

    @property
    def weights(self) -> float:
        """Bytes of the weights that a step reads."""
        return 2.0 * (self.shape.linear + self.shape.hidden * self.shape.vocabulary)

    def step(self, lengths: Sequence[int]) -> float:
        """Seconds of a step in which requests of these lengths get a token."""
        read = self.weights + sum(map(self.cache_bytes, lengths))
        return read / self.rates.bytes_s

    def attention(self, tokens: int, context: int = 0) -> float:
        """Operations of the attention of ``tokens`` behind ``context`` others."""
        pairs = tokens * (context + tokens / 2)
        local = min(pairs, tokens * (self.kind.recent + self.kind.sinks))
        found = 0.0
        for (own, streaming), count in self._layers.items():
            shared = self.shape.heads - own - streaming
            # own scores of local keys for those that share; scores and V for those that stream
            each = (own + own + shared) * pairs + (shared + 2 * streaming) * local
            found += count * each
        return 2 * self.shape.head_dim * found

    def prompt(self, tokens: int, context: int = 0) -> float:
        """Seconds of a prompt, or of a part of it."""
        work = 2 * self.shape.linear * tokens + self.attention(tokens, context)
        return work / self.rates.operations_s

    def load(
        self, requests: Lengths, room: float, most: int, budget: int, shared: int = 0
    ) -> float:
        """Seconds of requests that come at once.

        Args:
            requests: tokens of each one's prompt and output.
            room: bytes of the K,V cache.
            most: requests that may run at a time.
            budget: tokens of a step.
            shared: first tokens of all prompts that are the same, read once and held once.
        """
        waiting = deque(_Request(prompt, output, shared) for prompt, output in requests)
        if shared:
            waiting[0].cached = 0
        running: list[_Request] = []
        common, seconds = self.cache_bytes(shared), 0.0
        while waiting or running:
            left, used = budget, common
            scheduled: list[tuple[_Request, int]] = []
            for place, request in enumerate(running):
                count = min(left, request.tokens - request.cached)
                size = self.cache_bytes(request.cached + count) - common
                if used + size > room and place:  # these are preempted, and read all again
                    for gone in running[place:]:
                        gone.cached = shared
                    waiting.extendleft(reversed(running[place:]))
                    del running[place:]
                    break
                used, left = used + size, left - count
                scheduled.append((request, count))
            while waiting and left and len(running) < most:
                request = waiting[0]
                size = self.cache_bytes(request.tokens) - common
                if used + size > room and running:
                    break
                count = min(left, request.tokens - request.cached)
                used, left = used + size, left - count
                running.append(waiting.popleft())
                scheduled.append((request, count))
            seconds += self._mixed(scheduled)
            for request, count in scheduled:
                request.cached += count
                if request.cached == request.tokens:  # a token is written, to be read next
                    request.tokens += 1
                    request.left -= 1
            running = [request for request in running if request.left]
        return seconds

    def _mixed(self, scheduled: Sequence[tuple[_Request, int]]) -> float:
        """Seconds of a step that reads so many tokens of each request."""
        tokens = sum(count for _, count in scheduled)
        products = 2 * self.shape.linear * tokens / self.rates.operations_s
        seconds = max(products, self.weights / self.rates.bytes_s)
        for request, count in scheduled:
            if count == 1:
                seconds += self.cache_bytes(request.cached) / self.rates.bytes_s
            else:
                seconds += self.attention(count, request.cached) / self.rates.operations_s
        return seconds


@dataclass
class _Request:
    """A request under way: tokens that it has, of these in the cache, and yet to be written."""

    tokens: int
    left: int
    cached: int

    def __init__(self, prompt: int, output: int, cached: int):
        self.tokens, self.left, self.cached = prompt, output, cached
