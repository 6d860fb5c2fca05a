"""How many tokens of K and V fit into a GPU, and what that gains, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from chai_attention.errors import ChaiError
from chai_attention.integrations.vllm.copies import MOST_TOKENS, copied_tokens
from chai_attention.integrations.vllm.layers import ServedLayer, near_page_tokens, served_layers
from chai_attention.integrations.vllm.pages import PAGE, near_pages_of
from chai_attention.integrations.vllm.reserve import row_bytes
from chai_attention.integrations.vllm.savings import Savings, savings
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import ModelShape

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
class Blocks:
    """Blocks of a model's K,V cache: a page of every layer, or near pages of all layers.

    vLLM hands both out from one store, so a block is as large as the larger of the two.

    Attributes:
        page: tokens of a far page.
        near_page: tokens of a near page; None if there are none.
        far_bytes: of a far page in all layers.
        near_bytes: of a near page in all layers.
        recent: w.
        sinks: s.
    """

    page: int
    near_page: int | None
    far_bytes: int
    near_bytes: int
    recent: int = 0
    sinks: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return max(self.far_bytes, self.near_bytes)

    @property
    def wasted(self) -> float:
        """Share of the blocks' bytes that the smaller kind of page leaves empty, in its blocks."""
        if self.near_page is None:
            return 0.0
        return 1 - min(self.far_bytes, self.near_bytes) / self.block_bytes

    def near_pages(self, tokens: int, new: int = 1) -> int:
        """Near pages of a request, while ``new`` of its ``tokens`` are being read."""
        if self.near_page is None:
            return 0
        return near_pages_of(tokens, self.near_page, self.recent, self.sinks, new)

    def of_request(self, tokens: int, new: int = 1) -> int:
        """Blocks of a request, while ``new`` of its ``tokens`` are being read."""
        return -(-tokens // self.page) + self.near_pages(tokens, new)


@dataclass(frozen=True)
class Capacity:
    """What fits into a K,V cache.

    Attributes:
        per: what a block holds.
        blocks: that fit, vLLM's ``num_gpu_blocks``.
        batch_tokens: most tokens of a step, all of whose near pages are there while it runs.
    """

    per: Blocks
    blocks: int
    batch_tokens: int

    def requests(self, context: int) -> int:
        """Requests of ``context`` tokens that fit, the last of them while its prompt is read."""
        left = self.blocks - 1 - self.per.of_request(context, min(context, self.batch_tokens))
        return 0 if left < 0 else 1 + left // self.per.of_request(context)

    def tokens(self, context: int) -> int:
        """Tokens that fit, in requests of ``context`` of them."""
        return self.blocks * context // self.per.of_request(context)


@dataclass(frozen=True)
class Budget:
    """Memory of one GPU, in bytes.

    Attributes:
        total: all that vLLM may use.
        weights: the model's, of one rank.
        activations: of the largest batch, roughly.
        copies: of 8-bit pages, for prompts of layers without an exact window.
        tables: of online memberships, a row for each block.
    """

    total: int
    weights: int
    activations: int
    copies: int
    tables: int

    @property
    def cache(self) -> int:
        """What is left for K and V."""
        return self.total - self.weights - self.activations - self.copies - self.tables - RUNTIME


@dataclass(frozen=True)
class Estimate:
    """A model on a GPU, with all heads' K and with a profile.

    Attributes:
        full: capacity with K and V of all heads.
        clustered: capacity with the profile.
        budget: memory with the profile.
        token_bytes: K,V bytes per token of one rank: all heads, with the profile.
        window_bytes: bytes of one request's window that a step reads besides.
        requests: that may run at a time.
        savings: what ranks save, beside one that holds all heads.
    """

    full: Capacity
    clustered: Capacity
    budget: Budget
    token_bytes: tuple[int, int]
    window_bytes: int
    requests: int
    savings: Savings

    def capacity_gain(self, context: int) -> float:
        """Tokens that fit in requests of ``context``, relative to a full cache."""
        return self.clustered.tokens(context) / max(1, self.full.tokens(context))

    def decode_gain(self, batch: int, context: int) -> float:
        """Time of a decode step with a full cache over that with the profile, at best.

        Both read weights and cache once, and memory is what they wait for.
        """
        full, kept = self.token_bytes
        tokens = batch * context
        weights = self.budget.weights
        return (weights + full * tokens) / (weights + kept * tokens + self.window_bytes * batch)


def blocks_of(
    layers: tuple[ServedLayer, ...], head_dim: int, element_size: int = 2, page: int = BLOCK
) -> Blocks:
    """What vLLM's planner makes blocks of.

    Args:
        layers: of one rank.
        head_dim: D, of K and V.
        element_size: bytes of a number in pages.
        page: tokens of a far page.
    """
    far = sum(layer.layout(head_dim, head_dim).page_bytes(page, element_size) for layer in layers)
    held = [layer.near_layout(head_dim, head_dim) for layer in layers]
    found = [layout for layout in held if layout is not None]
    if not found:
        return Blocks(page, None, far, 0)
    tokens = near_page_tokens(layers, page, head_dim, head_dim)
    near = sum(layout.page_bytes(tokens, element_size) for layout in found)
    plan = next(layer.plan for layer in layers if layer.plan.has_recent_window)
    return Blocks(page, tokens, far, near, plan.recent, plan.sinks)


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
    block: int | None = None,
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
        element_size: bytes of a number of hidden states.
        cache_element_size: the same of the K,V cache; None: as many.
        block: its ``--block-size``; None: 64 with clusters, without them vLLM's 16.
        ranks: its ``--tensor-parallel-size``.

    Raises:
        ChaiError: the model does not fit, or the profile does not fit the model.
    """
    size, cached = shape.head_dim, cache_element_size or element_size
    layers = served_layers(shape, profile, ranks)
    plain = served_layers(shape, ClusterProfile((shape.heads,) * shape.layers), ranks)
    full, kept = (
        blocks_of(kind, size, cached, block or page)
        for kind, page in ((plain, BLOCK), (layers, PAGE))
    )
    # about ten hidden states a token alive at once, and float32 scores of the vocabulary
    hidden = shape.hidden_size or shape.heads * size
    activations = batch_tokens * hidden * 10 * element_size + requests * vocabulary * 8 // ranks
    total, weights = int(gpu_bytes * utilization), weight_bytes // ranks
    copies = 0
    if cached < element_size:
        copied = [layer for layer in layers if layer.reads_copies]
        numbers = (layer.layout(size, size).numbers_per_token for layer in copied)
        copies = copied_tokens(batch_tokens, longest) * max(numbers, default=0) * element_size
    left = total - weights - activations - RUNTIME
    if left - copies <= 0:
        raise ChaiError(
            f"{gpu_bytes / 1e9:.0f} GB at a utilization of {utilization:g} leave no room for K and "
            f"V beside {weights / 1e9:.1f} GB of weights: use more memory, more ranks or fewer "
            "requests (--max-num-seqs)"
        )
    row = sum(row_bytes(layer, size) for layer in layers)
    blocks = (left - copies) // (kept.block_bytes + row)
    near_numbers = kept.near_bytes // (kept.near_page or 1)
    return Estimate(
        Capacity(full, left // full.block_bytes, batch_tokens),
        Capacity(kept, blocks, batch_tokens),
        Budget(total, weights, activations, copies, blocks * row),
        (full.far_bytes // full.page, kept.far_bytes // kept.page),
        near_numbers * (kept.recent + kept.sinks),
        requests,
        savings(shape, profile, ranks, layers),
    )
