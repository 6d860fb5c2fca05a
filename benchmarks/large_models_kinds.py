"""What `large_models.py` compares: kinds of attention, and the models' shapes for a CPU."""

from __future__ import annotations

from collections.abc import Callable

from transformers import LlamaConfig, OPTConfig, PreTrainedConfig

from chai_attention.benchmarking.model import FUSED, UNFUSED
from chai_attention.profile import PUBLISHED as SCHEDULES
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import ModelShape

PUBLISHED, DEFAULT = "published", "default recipe"
KINDS = (UNFUSED, FUSED, PUBLISHED, DEFAULT)
WINDOW, SINKS = 128, 4
OWN, STREAMING = 8 / 32, 12 / 32  # of the heads: far K kept, and local keys only; the others share


def _llama() -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=104, intermediate_size=120, num_hidden_layers=3, num_attention_heads=13,
        num_key_value_heads=13, vocab_size=97,
    )  # fmt: skip


def _opt() -> PreTrainedConfig:
    return OPTConfig(
        hidden_size=96, word_embed_proj_dim=96, ffn_dim=128, num_hidden_layers=3,
        num_attention_heads=12, vocab_size=97,
    )  # fmt: skip


TINY: dict[str, Callable[[], PreTrainedConfig]] = {"llama-33b": _llama, "opt-66b": _opt}


def profile_of(kind: str, shape: ModelShape) -> ClusterProfile:
    """The profile of a kind of attention; that of a plain one has every head on its own.

    Weights are random, so which heads share and which stream does not matter, only how many.
    """
    if kind == PUBLISHED:
        return published_like(shape)
    if kind == DEFAULT:
        return default_like(shape)
    return ClusterProfile((shape.heads,) * shape.layers)


def published_like(shape: ModelShape) -> ClusterProfile:
    """The schedule published for LLaMA-33B, in proportion: online, by the first 5 tokens."""
    heads, schedule = SCHEDULES["llama-33b"]
    counts = [count for layers, count in schedule for _ in range(layers)]
    spread = [counts[layer * len(counts) // shape.layers] for layer in range(shape.layers)]
    clusters = tuple(max(1, round(count * shape.heads / heads)) for count in spread)
    return ClusterProfile(clusters, window=5)


def default_like(shape: ModelShape) -> ClusterProfile:
    """What the default recipe makes: heads with their own far K, heads that share, and streams."""
    heads = shape.heads
    own, streaming = max(1, round(OWN * heads)), round(STREAMING * heads)
    far = heads - streaming
    row = tuple(head % own if head < far else head for head in range(heads))
    return ClusterProfile(
        (own,) * shape.layers, membership="static", representatives=(row,) * shape.layers,
        streaming=(tuple(range(far, heads)),) * shape.layers, recent=WINDOW, sinks=SINKS,
    )  # fmt: skip
