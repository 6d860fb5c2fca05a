"""The roofline: measured bandwidth and matrix throughput, and the least time of work at both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from chai_attention.benchmarking.cases import DECODE, AttentionShape, Case
from chai_attention.benchmarking.timing import time_calls

CUDA_BYTES, CPU_BYTES = 2**31, 2**29  # many times the caches
CUDA_MATRIX, CPU_MATRIX = 8192, 2048


@dataclass(frozen=True)
class Ceilings:
    """Measured rates that little should exceed: inputs that fit a cache are read faster.

    Attributes:
        read_gb_s: bytes per nanosecond, the best of a copy (both ways counted) and of a sum.
        matmul_tflop_s: best of a matrix product in the dtype, either factor's rows in memory.
    """

    read_gb_s: float
    matmul_tflop_s: float


def drift(before: Ceilings, after: Ceilings) -> float:
    """Return how many times faster the machine was at one end of a run than at the other."""
    ratios = (
        after.read_gb_s / before.read_gb_s,
        after.matmul_tflop_s / before.matmul_tflop_s,
    )
    return max(max(ratio, 1 / ratio) for ratio in ratios)


@dataclass(frozen=True)
class Work:
    """What has to be done.

    Attributes:
        bytes: that have to be moved.
        flops: of matrix products.
    """

    bytes: float
    flops: float

    def ideal_us(self, ceilings: Ceilings) -> float:
        """Microseconds at the ceilings, moving and computing at the same time."""
        moving = self.bytes / ceilings.read_gb_s / 1e3
        return max(moving, self.flops / ceilings.matmul_tflop_s / 1e6)


def measure_ceilings(device: str, dtype: torch.dtype, seconds: float) -> Ceilings:
    """Measure this machine."""
    cuda = device == "cuda"
    source = torch.ones((CUDA_BYTES if cuda else CPU_BYTES) // 4, device=device)
    target = torch.empty_like(source)
    copy = time_calls([partial(target.copy_, source)], device, seconds).best_us
    total = time_calls([partial(torch.sum, source)], device, seconds).best_us
    size = source.nbytes
    del source, target
    n = CUDA_MATRIX if cuda else CPU_MATRIX
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = min(
        time_calls([partial(torch.mm, a, other)], device, seconds).best_us for other in (b, b.T)
    )
    return Ceilings(max(2 * size / copy, size / total) / 1e3, 2 * n**3 / product / 1e6)


def attention_work(
    case: Case,
    shape: AttentionShape,
    clusters: int,
    kept_keys: int,
    element_size: int,
    local: int = 0,
    stored_size: int | None = None,
    streaming: int = 0,
    kept_values: int | None = None,
    sliding: int | None = None,
) -> Work:
    """Least work of causal attention with clusters.

    Decode reads K and V of the kept heads, and local ones of the others. Prefill computes scores of
    the representatives and the product with V of all heads that do not stream, each for half of
    the pairs of tokens (CHAI, section 3.1), and what is local: scores of heads that share, scores
    and product of heads that stream.

    Args:
        case: the size.
        shape: of the layer.
        clusters: k.
        kept_keys: K heads that are held.
        element_size: bytes of a number.
        local: keys that every head sees with its own scores, recent and first ones together.
        stored_size: bytes of a number of K and V that are held; None for ``element_size``.
        streaming: heads that see local keys only.
        kept_values: V heads that are held; None for all.
        sliding: last keys that a query sees; None for all.
    """
    tokens, heads, dim = case.tokens, shape.heads, shape.head_dim
    seen = tokens if sliding is None else min(tokens, sliding)
    local = min(local, tokens) if clusters < heads else 0
    groups, kept_values = shape.kv_heads, shape.kv_heads if kept_values is None else kept_values
    whole = case.kind == DECODE
    pairs = case.batch * (seen if whole else seen * (seen + 1) / 2 + seen * (tokens - seen))
    flops = 2 * pairs * dim * (clusters + heads - streaming)
    flops += 2 * case.batch * case.queries * local * dim * (heads - clusters + streaming)
    stored = (seen if whole else tokens) * (kept_keys + kept_values)
    stored += local * (2 * groups - kept_keys - kept_values)
    others = case.queries * (clusters + heads)
    size = stored * (stored_size or element_size) + others * element_size
    return Work(float(case.batch * dim * size), float(flops))
