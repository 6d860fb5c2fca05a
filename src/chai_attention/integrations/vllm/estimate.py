"""How many tokens of K and V fit into a GPU, and what that gains, before anything is loaded.

Everything comes from the model's config, the profile and vLLM's options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from chai_attention.errors import ChaiError
from chai_attention.integrations.vllm.command_line import OptionError, Options
from chai_attention.integrations.vllm.copies import MOST_COPIED, workspace_numbers
from chai_attention.integrations.vllm.layers import (
    PAGE,
    LayerShard,
    local_page_tokens,
    local_pages_of,
)
from chai_attention.integrations.vllm.memberships import row_bytes
from chai_attention.integrations.vllm.options import (
    EIGHT_BITS,
    cache_problem,
    page_size_problem,
)
from chai_attention.integrations.vllm.shares import Savings, layer_shards, savings
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import ModelShape, describe
from chai_attention.runtime.skeleton import empty_model

BLOCK = 16  # tokens of a page, vLLM's default on CUDA
GIB = 2**30
RUNTIME = 10**9  # CUDA context, graphs and workspaces, roughly
_SIZES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


@dataclass(frozen=True)
class EngineOptions:
    """What vLLM is started with, as far as memory depends on it.

    Attributes:
        gpu_bytes: memory of a GPU.
        utilization: ``--gpu-memory-utilization``.
        requests: ``--max-num-seqs``.
        batch_tokens: ``--max-num-batched-tokens``.
        longest: ``--max-model-len``.
        cache_element_size: bytes of a number of the K,V cache; None: as many as hidden states have.
        block: ``--block-size``; None: 64 with clusters, without them vLLM's 16.
        ranks: ``--tensor-parallel-size``.
        cache_bytes: ``--kv-cache-memory-bytes``; None: what is left.
        blocks: ``--num-gpu-blocks-override``; None: as many as fit.
    """

    gpu_bytes: int
    utilization: float = 0.92
    requests: int = 256
    batch_tokens: int = 8192
    longest: int = MOST_COPIED
    cache_element_size: int | None = None
    block: int | None = None
    ranks: int = 1
    cache_bytes: int | None = None
    blocks: int | None = None

    @classmethod
    def of(cls, options: Options, gpu_bytes: int, most: int) -> EngineOptions:
        """Read the options of a server; what is not given is chosen as vLLM does.

        Args:
            options: of ``vllm serve``.
            gpu_bytes: memory of a GPU.
            most: tokens that the model can read.

        Raises:
            OptionError: one that is no number, or out of range; layers on several GPUs.
        """
        if options.count("--pipeline-parallel-size", 1) > 1:
            raise OptionError(
                "an estimate is of GPUs that hold every layer: leave out --pipeline-parallel-size, "
                "or estimate with --tensor-parallel-size"
            )
        share = options.number("--gpu-memory-utilization", 0.92)
        if not 0 < share <= 1:
            raise OptionError(
                f"--gpu-memory-utilization is a share of more than 0 and at most 1, not {share:g}"
            )
        cache = options.text("--kv-cache-dtype") or "auto"
        block = options.count("--block-size", 0) or None
        for problem in (cache_problem(cache, None), page_size_problem(block)):
            if problem is not None:
                raise OptionError(f"clustered heads do not support {problem}")
        left_to_vllm = options.text("--max-model-len") in ("auto", "-1")
        longest = most if left_to_vllm else options.count("--max-model-len", most)
        requests, tokens = batch_defaults(gpu_bytes)
        if options.text("--performance-mode") == "throughput":
            requests, tokens = 2 * requests, 2 * tokens
        given = options.count("--max-num-seqs", 0)
        tokens = min(tokens, (given or requests) * longest)
        tokens = options.count("--max-num-batched-tokens", tokens)
        return cls(
            gpu_bytes, share, given or min(requests, tokens), tokens, longest,
            1 if cache in EIGHT_BITS else None, block,
            options.count("--tensor-parallel-size", 1),
            options.count("--kv-cache-memory-bytes", 0) or None,
            options.count("--num-gpu-blocks-override", 0) or None,
        )  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """Blocks of a model's K,V cache: a page of every layer, or local pages of all layers.

    vLLM hands both out from one store, so a block is as large as the larger of the two.

    Attributes:
        page: tokens of a far page.
        local_page: tokens of a local page; None if there are none.
        far_bytes: of a far page in all layers.
        local_bytes: of a local page in all layers.
        recent: w.
        sinks: s.
    """

    page: int
    local_page: int | None
    far_bytes: int
    local_bytes: int
    recent: int = 0
    sinks: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return max(self.far_bytes, self.local_bytes)

    @property
    def wasted(self) -> float:
        """Share of a block's bytes that the smaller kind of page leaves empty."""
        if self.local_page is None:
            return 0.0
        return 1 - min(self.far_bytes, self.local_bytes) / self.block_bytes

    def local_pages(self, tokens: int, new: int = 1) -> int:
        """Local pages of a request, while ``new`` of its ``tokens`` are being read."""
        if self.local_page is None:
            return 0
        return local_pages_of(tokens, self.local_page, self.recent, self.sinks, new)

    def of_request(self, tokens: int, new: int = 1) -> int:
        """Blocks of a request, while ``new`` of its ``tokens`` are being read."""
        return -(-tokens // self.page) + self.local_pages(tokens, new)


@dataclass(frozen=True)
class Capacity:
    """What fits into a K,V cache.

    Attributes:
        per: what a block holds.
        blocks: that fit, vLLM's ``num_gpu_blocks``.
        batch_tokens: most tokens of a step, all of whose local pages are there while it runs.
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
        copies: of 8-bit pages, for prompts.
        tables: of online memberships, a row for each block.
        given: for K and V, where an option says so.
    """

    total: int
    weights: int
    activations: int
    copies: int
    tables: int
    given: int | None = None

    @property
    def cache(self) -> int:
        """What K and V may take."""
        if self.given is not None:
            return self.given
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
    layers: tuple[LayerShard, ...], head_dim: int, element_size: int = 2, page: int = BLOCK
) -> Blocks:
    """What vLLM's planner makes blocks of.

    Args:
        layers: of one rank.
        head_dim: D, of K and V.
        element_size: bytes of a number in pages.
        page: tokens of a far page.
    """
    far = sum(layer.layout(head_dim, head_dim).page_bytes(page, element_size) for layer in layers)
    held = [layer.local_layout(head_dim, head_dim) for layer in layers]
    found = [layout for layout in held if layout is not None]
    if not found:
        return Blocks(page, None, far, 0)
    tokens = local_page_tokens(layers, page, head_dim, head_dim)
    local = sum(layout.page_bytes(tokens, element_size) for layout in found)
    plan = next(layer.plan for layer in layers if layer.plan.has_recent_window)
    return Blocks(page, tokens, far, local, plan.recent, plan.sinks)


def estimate(
    shape: ModelShape,
    profile: ClusterProfile,
    engine: EngineOptions,
    *,
    weight_bytes: int,
    vocabulary: int,
    element_size: int = 2,
) -> Estimate:
    """Estimate capacity and gain of one rank.

    Args:
        shape: the model's.
        profile: for it.
        engine: what it runs with.
        weight_bytes: of the whole model.
        vocabulary: entries of the output layer.
        element_size: bytes of a number of hidden states.

    Raises:
        ChaiError: the model does not fit, or the profile does not fit the model.
    """
    size, cached = shape.head_dim, engine.cache_element_size or element_size
    ranks, batch_tokens = engine.ranks, engine.batch_tokens
    layers = layer_shards(shape, profile, ranks)
    plain = layer_shards(shape, ClusterProfile((shape.heads,) * shape.layers), ranks)
    full, kept = (
        blocks_of(kind, size, cached, engine.block or page)
        for kind, page in ((plain, BLOCK), (layers, PAGE))
    )
    # about ten hidden states a token alive at once, and float32 scores of the vocabulary
    hidden = shape.hidden_size or shape.heads * size
    scores = engine.requests * vocabulary * 8 // ranks
    activations = batch_tokens * hidden * 10 * element_size + scores
    total, weights = int(engine.gpu_bytes * engine.utilization), weight_bytes // ranks
    copies = 0
    if cached < element_size:
        local_page = kept.local_page or PAGE
        numbers = (
            workspace_numbers(layer, size, size, batch_tokens, engine.longest, local_page)
            for layer in layers
            if layer.needs_workspace
        )
        copies = max(numbers, default=0) * element_size
    left = total - weights - activations - RUNTIME
    if left - copies <= 0:
        raise ChaiError(
            f"{engine.gpu_bytes / 1e9:.0f} GB at a utilization of {engine.utilization:g} leave no "
            f"room for K and V beside {weights / 1e9:.1f} GB of weights: use more memory, more "
            "ranks or fewer requests (--max-num-seqs)"
        )
    row = sum(row_bytes(layer, size) for layer in layers)
    most, blocks = left // full.block_bytes, (left - copies) // (kept.block_bytes + row)
    given = engine.cache_bytes
    if given is not None:
        most, blocks = given // full.block_bytes, given // kept.block_bytes
    if engine.blocks is not None:
        most = blocks = engine.blocks
        given = blocks * kept.block_bytes
    local_numbers = kept.local_bytes // (kept.local_page or 1)
    return Estimate(
        Capacity(full, most, batch_tokens),
        Capacity(kept, blocks, batch_tokens),
        Budget(total, weights, activations, copies, blocks * row, given),
        (full.far_bytes // full.page, kept.far_bytes // kept.page),
        local_numbers * (kept.recent + kept.sinks),
        engine.requests,
        savings(shape, profile, ranks, layers),
    )


def estimate_config(
    config: PreTrainedConfig, profile: str, options: Sequence[str], gpu_bytes: int
) -> Estimate:
    """Estimate capacity and gain of a model.

    Args:
        config: the model's.
        profile: as `ClusterProfile.resolve` takes it.
        options: of ``vllm serve``; those that matter for memory are heeded.
        gpu_bytes: memory of one GPU.

    Raises:
        ChaiError: an option that is no number, a profile that does not fit, too little memory.
    """
    text, given = config.get_text_config(decoder=True), Options(options)
    size = element_size(text, given)
    engine = EngineOptions.of(given, gpu_bytes, text.max_position_embeddings)
    return estimate(
        describe(config), ClusterProfile.resolve(profile), engine,
        weight_bytes=parameters(config) * size, vocabulary=text.vocab_size, element_size=size,
    )  # fmt: skip


def element_size(config: PreTrainedConfig, options: Options) -> int:
    """Bytes of a number of the model's weights and hidden states as vLLM runs it."""
    saved = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    named = options.text("--dtype") or "auto"
    # vLLM runs checkpoints in float32 as float16 unless --dtype says otherwise
    if named not in ("auto", *_SIZES):
        raise OptionError(f"--dtype is one of auto, {', '.join(_SIZES)}, not {named!r}")
    dtype = saved if named == "auto" and saved != "float32" else named
    return _SIZES.get(dtype, 2)


def parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model, counted without any memory for them."""
    model = empty_model(config, torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())


def batch_defaults(gpu_bytes: int) -> tuple[int, int]:
    """What vLLM takes for ``--max-num-seqs`` and ``--max-num-batched-tokens`` on such a GPU.

    Of an A100 they are those of smaller GPUs, which bytes do not tell.
    """
    if gpu_bytes >= 160 * GIB:
        return 1024, 16384
    return (1024, 8192) if gpu_bytes >= 70 * GIB else (256, 2048)
