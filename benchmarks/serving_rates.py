"""How fast the GPU of an engine reads memory and multiplies matrices, measured in its worker.

There is little room beside an engine, so what it holds anyway is read: the K,V cache, of which
nothing is used yet or written here, and the weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from chai_attention.benchmarking.timing import Call, pass_us

CHUNK, CHUNKS = 2**28, 8  # float32 numbers that are summed at a time (1 GiB); of these at most
READ_S, MULTIPLY_S = 0.1, 0.3  # a GPU that multiplies clocks lower after a tenth of a second
TOKENS, ROWS = 4096, 8192  # of a product: 64 MiB in 16 bits
PRODUCTS = 8  # of a pass


def measure_rates(worker: Any) -> dict[str, float]:
    """Measure the device of a vLLM worker; called in the worker's process, before its loads.

    Args:
        worker: of which the model and the K,V cache are loaded.

    Returns:
        ``bytes_s``, the best of sums over a layer's K,V cache and of products of one token with the
        largest weights, as steps of decoding have them; ``operations_s``, the median of products of
        many tokens with the largest weight, one after the other.
    """
    model, caches = worker.get_model(), worker.model_runner.kv_caches
    with torch.inference_mode():
        weights = largest_matrices(model)
        return {
            "bytes_s": max(reading_rate(caches), streaming_rate(weights)),
            "operations_s": multiplying_rate(weights[0]),
        }


def largest_matrices(model: torch.nn.Module) -> list[torch.Tensor]:
    """All matrices of at least half the size of the largest one, which comes first."""
    found = [weight.detach() for weight in model.parameters() if weight.dim() == 2]
    found.sort(key=lambda weight: weight.numel(), reverse=True)
    return [weight for weight in found if 2 * weight.numel() >= found[0].numel()]


def reading_rate(caches: Sequence[torch.Tensor]) -> float:
    """Bytes per second of sums over the largest of these buffers, whatever views they are."""
    storage = max((cache.untyped_storage() for cache in caches), key=lambda held: held.nbytes())
    count = min(storage.nbytes() // 4, CHUNK * CHUNKS)
    numbers = torch.empty(0, device=storage.device, dtype=torch.float32)
    numbers.set_(storage, 0, (count,), (1,))
    calls = [partial(torch.sum, chunk) for chunk in numbers.split(CHUNK)]
    return 4 * count / min(_passes(calls, storage.device, READ_S))


def streaming_rate(weights: Sequence[torch.Tensor]) -> float:
    """Bytes per second of products of one token with each of these matrices."""
    calls = [
        partial(functional.linear, weight.new_ones(1, weight.shape[1]), weight)
        for weight in weights
    ]
    size = sum(weight.nbytes for weight in weights)
    return size / min(_passes(calls, weights[0].device, READ_S))


def multiplying_rate(weight: torch.Tensor) -> float:
    """Operations per second of products of many tokens with a matrix, or with its first rows."""
    weight = weight[:ROWS]
    rows, width = weight.shape
    tokens = torch.randn(TOKENS, width, device=weight.device, dtype=weight.dtype)
    # into the same memory, of which there is little
    target = tokens.new_empty(TOKENS, rows)
    calls = [partial(torch.mm, tokens, weight.T, out=target)] * PRODUCTS
    passes = _passes(calls, weight.device, MULTIPLY_S)
    return 2 * TOKENS * rows * width * PRODUCTS / statistics.median(passes)


def _passes(calls: Sequence[Call], device: torch.device, seconds: float) -> list[float]:
    """Seconds of each pass for as long as this, behind one that does not count."""
    pass_us(calls, device.type)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        times.append(pass_us(calls, device.type) / 1e6)
    return times
