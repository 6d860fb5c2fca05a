"""How many tokens of K and V fit into a GPU, and what that gains, before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from chai_attention.errors import ChaiError
from chai_attention.integrations.transformers.support import ModelShape
from chai_attention.integrations.vllm.copies import MOST_TOKENS, copied_tokens
from chai_attention.integrations.vllm.layers import ServedLayer, served_layers
from chai_attention.profile import ClusterProfile

BLOCK = 16  # tokens of a page, vLLM's default on CUDA
GIB = 2**30
RUNTIME = 10**9  # CUDA context, graphs and workspaces, roughly


def batch_defaults(gpu_bytes: int) -> tuple[int, int]:
    """What vLLM takes for ``--max-num-seqs`` and ``--max-num-batched-tokens`` on such a GPU.

    Of an A100 they are those of smaller GPUs, which bytes do not tell.
    """
    if gpu_bytes >= 160 * GIB:
        return 1024, 16384
    return (1024, 8192) if gpu_bytes >= 70 * GIB else (256, 2048)


@dataclass(frozen=True)
class Capacity:
    """What fits into a K,V cache.

    Attributes:
        block_bytes: bytes of one page in all layers.
        blocks: pages that fit, vLLM's ``num_gpu_blocks``.
        tokens: tokens in them.
    """

    block_bytes: int
    blocks: int
    tokens: int


@dataclass(frozen=True)
class Budget:
    """Memory of one GPU, in bytes.

    Attributes:
        total: all that vLLM may use.
        weights: the model's, of one rank.
        activations: of the largest batch, roughly.
        windows: K of the exact recent windows of all requests.
        copies: of 8-bit pages, for prompts.
    """

    total: int
    weights: int
    activations: int
    windows: int
    copies: int

    @property
    def cache(self) -> int:
        """What is left for K and V."""
        taken = self.weights + self.activations + self.windows + self.copies + RUNTIME
        return self.total - taken


@dataclass(frozen=True)
class Estimate:
    """A model on a GPU, with all heads' K and with a profile.

    Attributes:
        full: capacity with K of all heads.
        clustered: capacity with the profile.
        budget: memory with the profile.
        token_bytes: K,V bytes per token of one rank: all heads, with the profile.
        window_bytes: bytes of one request's recent window.
        requests: that may run at a time.
    """

    full: Capacity
    clustered: Capacity
    budget: Budget
    token_bytes: tuple[int, int]
    window_bytes: int
    requests: int

    @property
    def capacity_gain(self) -> float:
        """Tokens that fit, relative to a full cache."""
        return self.clustered.tokens / max(1, self.full.tokens)

    def decode_gain(self, batch: int, context: int) -> float:
        """Time of a decode step with a full cache over that with the profile, at best.

        Both read weights and cache once, and memory is what they wait for.
        """
        full, kept = self.token_bytes
        tokens = batch * context
        weights = self.budget.weights
        return (weights + full * tokens) / (weights + kept * tokens + self.window_bytes * batch)


def capacity(
    layers: tuple[ServedLayer, ...],
    head_dim: int,
    cache_bytes: int,
    element_size: int = 2,
    block: int = BLOCK,
) -> Capacity:
    """Pages that vLLM's planner makes of ``cache_bytes``.

    Args:
        layers: of one rank.
        head_dim: D, of K and V.
        cache_bytes: memory for K and V on one GPU.
        element_size: bytes of a number.
        block: tokens of a page.
    """
    each = sum(layer.layout(head_dim, head_dim).page_bytes(block, element_size) for layer in layers)
    blocks = max(0, cache_bytes) // each
    return Capacity(each, blocks, blocks * block)


def near_bytes(
    layers: tuple[ServedLayer, ...], head_dim: int, element_size: int, drafts: int = 0
) -> int:
    """Bytes of one request's exact recent window; taken at start for as many as may run.

    Args:
        layers: of one rank.
        head_dim: D.
        element_size: bytes of a number.
        drafts: tokens that a step may take back.
    """
    return sum(
        (layer.plan.kv_heads - layer.kept)
        * (layer.plan.recent + drafts + layer.plan.sinks)
        * head_dim
        * element_size
        for layer in layers
        if layer.plan.has_recent_window
    )


def refuse_windows(requests: int, each: int, memory: int) -> None:
    """Stop where the exact recent windows cannot be held, before they are taken.

    Args:
        requests: that may run at a time.
        each: bytes of one request's window.
        memory: of the device, in bytes.

    Raises:
        ChaiError: says how many requests fit.
    """
    if requests * each >= memory:
        raise ChaiError(
            f"recent windows of {requests:,} requests take {requests * each / 1e9:,.1f} GB of "
            f"{memory / 1e9:,.1f} GB, at start: lower --max-num-seqs, to well below "
            f"{memory // each:,}"
        )


def device_memory() -> int:
    """Bytes of the first GPU, or of the machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def estimate(
    shape: ModelShape,
    profile: ClusterProfile,
    *,
    gpu_bytes: int,
    weight_bytes: int,
    vocabulary: int,
    utilization: float = 0.92,
    requests: int = 256,
    batch_tokens: int = 8192,
    longest: int = MOST_TOKENS,
    element_size: int = 2,
    cache_element_size: int | None = None,
    block: int = BLOCK,
    ranks: int = 1,
) -> Estimate:
    """Estimate capacity and gain of one rank.

    Args:
        shape: the model's.
        profile: for it.
        gpu_bytes: memory of a GPU.
        weight_bytes: of the whole model.
        vocabulary: entries of the output layer.
        utilization: vLLM's ``--gpu-memory-utilization``.
        requests: its ``--max-num-seqs``.
        batch_tokens: its ``--max-num-batched-tokens``.
        longest: its ``--max-model-len``.
        element_size: bytes of a number of hidden states and of the recent window.
        cache_element_size: the same of the K,V cache; None: as many.
        block: its ``--block-size``.
        ranks: its ``--tensor-parallel-size``.

    Raises:
        ChaiError: the model does not fit, or the profile does not fit the model.
    """
    layers = served_layers(shape, profile, ranks)
    plain = served_layers(shape, ClusterProfile((shape.heads,) * shape.layers), ranks)
    window_bytes = near_bytes(layers, shape.head_dim, element_size)
    # about ten hidden states a token alive at once, and float32 scores of the vocabulary
    hidden = shape.hidden_size or shape.heads * shape.head_dim
    activations = batch_tokens * hidden * 10 * element_size + requests * vocabulary * 8 // ranks
    total = int(gpu_bytes * utilization)
    weights = weight_bytes // ranks
    cache_element_size = cache_element_size or element_size
    copies = 0
    if cache_element_size < element_size:
        copied = [layer for layer in layers if not layer.plan.is_identity]
        numbers = (
            layer.layout(shape.head_dim, shape.head_dim).numbers_per_token for layer in copied
        )
        copies = copied_tokens(batch_tokens, longest) * max(numbers, default=0) * element_size
    budgets = [
        Budget(total, weights, activations, 0, 0),
        Budget(total, weights, activations, window_bytes * requests, copies),
    ]
    if min(budget.cache for budget in budgets) <= 0:
        raise ChaiError(
            f"{gpu_bytes / 1e9:.0f} GB at a utilization of {utilization:g} leave no room for K and "
            f"V beside {weights / 1e9:.1f} GB of weights"
            + (f" and windows of {requests} requests" if window_bytes else "")
            + ": use more memory, more ranks or fewer requests (--max-num-seqs)"
        )
    full, clustered = (
        capacity(kind, shape.head_dim, budget.cache, cache_element_size, block)
        for kind, budget in zip((plain, layers), budgets, strict=True)
    )
    return Estimate(
        full,
        clustered,
        budgets[1],
        (full.block_bytes // block, clustered.block_bytes // block),
        window_bytes,
        requests,
    )
