"""What the serving benchmark compares: shapes of models, and what profiles do with their heads.

All weights are random, so which heads share and which stream does not matter, only how many. Every
rank of a tensor-parallel group gets its part of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEVEN, EIGHT, THIRTY, SIXTY = "llama-7b", "llama-3-8b", "llama-33b", "opt-66b"
WINDOW = 128
SINKS = 4


@dataclass(frozen=True)
class Shape:
    """A model's shape; `vllm` reads it from a config that `write` makes.

    Attributes:
        learned: tokens that learned positions are for, of an OPT; None for Llama's rotary ones.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    learned: int | None = None

    @property
    def linear(self) -> int:
        """Weights that every token is multiplied with, the output layer's left out."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        matrices = 3 if self.learned is None else 2  # an OPT has no gate
        return self.layers * (attention + matrices * self.hidden * self.intermediate)

    def write(self, folder: Path, dtype: str) -> None:
        """Write a config of Llama's or OPT's architecture."""
        from transformers import LlamaConfig, OPTConfig

        common = {
            "dtype": dtype, "num_hidden_layers": self.layers, "hidden_size": self.hidden,
            "num_attention_heads": self.heads, "vocab_size": self.vocabulary,
        }  # fmt: skip
        if self.learned is not None:
            OPTConfig(
                **common, architectures=["OPTForCausalLM"], ffn_dim=self.intermediate,
                word_embed_proj_dim=self.hidden, max_position_embeddings=self.learned,
            ).save_pretrained(folder)  # fmt: skip
            return
        LlamaConfig(
            **common, architectures=["LlamaForCausalLM"], max_position_embeddings=2**16,
            intermediate_size=self.intermediate, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
        ).save_pretrained(folder)  # fmt: skip


SHAPES = {
    SEVEN: Shape(32, 4096, 11008, 32, 32, 128, 32000),
    EIGHT: Shape(32, 4096, 14336, 32, 8, 128, 128256),
    THIRTY: Shape(60, 6656, 17920, 52, 52, 128, 32000),
    SIXTY: Shape(64, 9216, 36864, 72, 72, 128, 50272, learned=2048),
}
TINY = {  # as many heads, so that profiles are the same
    SEVEN: Shape(3, 256, 256, 32, 32, 32, 512),
    EIGHT: Shape(3, 256, 256, 32, 8, 32, 512),
    THIRTY: Shape(6, 1664, 256, 52, 52, 32, 512),
    SIXTY: Shape(6, 2304, 256, 72, 72, 32, 512, learned=512),
}


@dataclass(frozen=True)
class Kind:
    """A model, and in what its engine differs from vLLM as it is.

    Attributes:
        model: name of its shape.
        own: query heads of a layer that keep their scores for far keys, or from the first layer to
            the last (layers, such heads); None for vLLM as it is.
        streaming: query heads of a layer that see local keys only; the others share scores.
        membership: "static" or "online".
        recent: w; with it there are 4 sinks.
        cache_dtype: of K and V.
    """

    model: str = SEVEN
    own: int | tuple[tuple[int, int], ...] | None = None
    streaming: int = 0
    membership: str = "static"
    recent: int = 0
    cache_dtype: str = "auto"

    @property
    def sinks(self) -> int:
        """First tokens that every head sees."""
        return SINKS if self.recent else 0

    def layers(self, shape: Shape, ranks: int = 1) -> list[tuple[int, int]]:
        """Each layer's query heads with scores of their own, and those that stream.

        A rank has whole K/V heads, and as many as the others: of those with scores of their own
        rather more than asked for, of those that stream rather fewer.
        """
        part = ranks * shape.heads // shape.kv_heads
        schedule = self.own if isinstance(self.own, tuple) else ((1, self.own or shape.heads),)
        owns = [own for layers, own in schedule for _ in range(layers)]
        # a narrow model has few of these layers
        owns = [owns[layer * len(owns) // shape.layers] for layer in range(shape.layers)]
        streaming = self.streaming // part * part
        return [(-(-own // part) * part, streaming if own < shape.heads else 0) for own in owns]

    def profile(self, shape: Shape, ranks: int = 1) -> dict[str, Any] | None:
        """The profile, as JSON holds it; None for vLLM as it is."""
        if self.own is None:
            return None
        layers = self.layers(shape, ranks)
        heads = [roles(shape, own, streaming, ranks) for own, streaming in layers]
        found: dict[str, Any] = {
            "clusters": [own for own, _ in layers],
            "membership": self.membership,
        }
        if self.membership == "static":
            found["representatives"] = [own for own, _ in heads]
        else:
            # what requests too short to tell fall back on
            found["similarity"] = [
                [[float(a == b) for b in own] for a in own] for own, _ in heads
            ]  # fmt: skip
        if self.streaming:
            found["streaming"] = [streaming for _, streaming in heads]
        if self.recent:
            found |= {"recent": self.recent, "sinks": self.sinks}
        return found


def roles(shape: Shape, own: int, streaming: int, ranks: int) -> tuple[list[int], list[int]]:
    """Each head's representative, and the heads that stream; as many on each rank."""
    here = shape.heads // ranks
    own, local = own // ranks, streaming // ranks
    representatives, streams = [], []
    for start in range(0, shape.heads, here):
        for head in range(here):
            is_far = head < here - local
            representatives.append(start + (head % own if is_far else head))
            if not is_far:
                streams.append(start + head)
    return representatives, streams


_PUBLISHED: dict[str, Any] = {"own": ((18, 32), (14, 4))}
_THIRTY: dict[str, Any] = {"own": ((18, 48), (8, 36), (6, 24), (2, 8), (26, 6))}
# none is published for OPT-66B: the same shares of layers and heads, in whole heads of 4 ranks
_SIXTY: dict[str, Any] = {"own": ((19, 68), (9, 48), (6, 32), (2, 12), (28, 8))}
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
    "33b stock": Kind(THIRTY),
    "33b published": Kind(THIRTY, **_THIRTY),
    "33b published online": Kind(THIRTY, **_THIRTY, membership="online"),
    "33b default": Kind(THIRTY, own=12, streaming=20, recent=WINDOW),
    "66b stock": Kind(SIXTY),
    "66b published": Kind(SIXTY, **_SIXTY),
    "66b published online": Kind(SIXTY, **_SIXTY, membership="online"),
    "66b default": Kind(SIXTY, own=16, streaming=28, recent=WINDOW),
}


def stock_of(name: str) -> str:
    """The kind that another one is compared with."""
    kind = KINDS[name]
    return next(
        other
        for other, plain in KINDS.items()
        if plain.own is None and (plain.model, plain.cache_dtype) == (kind.model, kind.cache_dtype)
    )
