"""What the serving benchmark compares: shapes of models, and what profiles do with their heads.

All weights are random, so which heads share and which stream does not matter, only how many. Every
rank of a tensor-parallel group gets its part of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEVEN, EIGHT = "llama-7b", "llama-3-8b"
WINDOW = 128
SINKS = 4


@dataclass(frozen=True)
class Shape:
    """A model's shape; `vllm` reads it from a config that `write` makes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def linear(self) -> int:
        """Weights that every token is multiplied with, the output layer's left out."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def write(self, folder: Path, dtype: str) -> None:
        """Write a config of Llama's architecture."""
        from transformers import LlamaConfig

        LlamaConfig(
            architectures=["LlamaForCausalLM"], dtype=dtype, max_position_embeddings=2**16,
            num_hidden_layers=self.layers, hidden_size=self.hidden,
            intermediate_size=self.intermediate, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, head_dim=self.head_dim, vocab_size=self.vocabulary,
        ).save_pretrained(folder)  # fmt: skip


SHAPES = {
    SEVEN: Shape(32, 4096, 11008, 32, 32, 128, 32000),
    EIGHT: Shape(32, 4096, 14336, 32, 8, 128, 128256),
}
TINY = {  # as many heads, so that profiles are the same
    SEVEN: Shape(3, 256, 256, 32, 32, 32, 512),
    EIGHT: Shape(3, 256, 256, 32, 8, 32, 512),
}


@dataclass(frozen=True)
class Kind:
    """A model, and in what its engine differs from vLLM as it is.

    Attributes:
        model: name of its shape.
        own: query heads of a layer that keep their scores for far keys; None for vLLM as it is.
        streaming: query heads of a layer that see near keys only; the others share scores.
        plain: of 32 layers, the first ones that are left as they are.
        membership: "static" or "online".
        recent: w; with it there are 4 sinks.
        cache_dtype: of K and V.
    """

    model: str = SEVEN
    own: int | None = None
    streaming: int = 0
    plain: int = 0
    membership: str = "static"
    recent: int = 0
    cache_dtype: str = "auto"

    @property
    def sinks(self) -> int:
        """First tokens that every head sees."""
        return SINKS if self.recent else 0

    def plain_layers(self, shape: Shape) -> int:
        """Layers that are left as they are."""
        return shape.layers if self.own is None else shape.layers * self.plain // 32

    def profile(self, shape: Shape, ranks: int = 1) -> dict[str, Any] | None:
        """The profile, as JSON holds it; None for vLLM as it is."""
        if self.own is None:
            return None
        own, streaming = roles(shape, self.own, self.streaming, ranks)
        plain, every = self.plain_layers(shape), list(range(shape.heads))
        clustered = range(plain, shape.layers)
        found: dict[str, Any] = {
            "clusters": [shape.heads] * plain + [self.own for _ in clustered],
            "membership": self.membership,
        }
        if self.membership == "static":
            found["representatives"] = [every] * plain + [own for _ in clustered]
        else:
            # what requests too short to tell fall back on
            alike = [[float(a == b) for b in own] for a in own]
            found["similarity"] = [alike] * shape.layers
        if streaming:
            found["streaming"] = [[]] * plain + [streaming for _ in clustered]
        if self.recent:
            found |= {"recent": self.recent, "sinks": self.sinks}
        return found


def roles(shape: Shape, own: int, streaming: int, ranks: int) -> tuple[list[int], list[int]]:
    """Each head's representative, and the heads that stream; whole K/V heads on each rank."""
    group, here = shape.heads // shape.kv_heads, shape.heads // ranks
    own, near = (count // ranks // group * group for count in (own, streaming))
    representatives, streams = [], []
    for start in range(0, shape.heads, here):
        for head in range(here):
            is_far = head < here - near
            representatives.append(start + (head % own if is_far else head))
            if not is_far:
                streams.append(start + head)
    return representatives, streams


_PUBLISHED = {"own": 4, "plain": 18}  # 18 layers x 32 clusters, 14 x 4
_DEFAULT: dict[str, Any] = {"own": 8, "streaming": 12, "recent": WINDOW}
KINDS = {
    "stock": Kind(),
    "published": Kind(**_PUBLISHED),
    "published online": Kind(**_PUBLISHED, membership="online"),
    "k=8": Kind(own=8),
    "k=8 window": Kind(own=8, recent=32),
    "default": Kind(**_DEFAULT),
    "streaming half": Kind(own=16, streaming=16, recent=WINDOW),
    "grouped stock": Kind(EIGHT),
    "grouped streaming": Kind(EIGHT, own=16, streaming=16, recent=WINDOW),
    "fp8 stock": Kind(cache_dtype="fp8"),
    "fp8 published": Kind(**_PUBLISHED, cache_dtype="fp8"),
    "fp8 k=8": Kind(own=8, cache_dtype="fp8"),
    "fp8 default": Kind(**_DEFAULT, cache_dtype="fp8"),
}


def stock_of(name: str) -> str:
    """The kind that another one is compared with."""
    kind = KINDS[name]
    return next(
        other
        for other, plain in KINDS.items()
        if plain.own is None and (plain.model, plain.cache_dtype) == (kind.model, kind.cache_dtype)
    )
