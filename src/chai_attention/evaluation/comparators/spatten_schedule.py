"""How much SpAtten keeps in which layer."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from chai_attention.errors import EvaluationError
from chai_attention.runtime.shape import ModelShape

# front layers that keep everything, as published
TOKEN_FRONT, HEAD_FRONT = 0.15, 0.3
# what the last layer drops by default. The mean over layers is near the published one for heads
# (1.1x fewer) and milder for tokens (1.9x), which was reached by fine-tuning
TOKEN_DROP, HEAD_DROP = 0.5, 0.2
MOST = 0.95  # no layer drops more tokens
LONG = 1 << 20  # tokens of a sequence in which rounding does not count


@dataclass(frozen=True)
class Schedule:
    """What each layer keeps.

    Attributes:
        tokens: share of the context per layer, never rising.
        heads: share of the K/V heads per layer, never rising.
    """

    tokens: tuple[float, ...]
    heads: tuple[float, ...]

    def prunes_tokens(self, layer: int) -> bool:
        """Whether some tokens are gone in this layer."""
        return self.tokens[layer] < 1

    def prunes_heads(self, layer: int) -> bool:
        """Whether some heads may be gone in this layer."""
        return self.heads[layer] < 1

    def prunes(self, layer: int) -> bool:
        """Whether anything may be gone in this layer."""
        return self.prunes_tokens(layer) or self.prunes_heads(layer)

    def heads_kept(self, layer: int, kv_heads: int) -> int:
        """K/V heads that are left in a layer."""
        return max(1, ceil(self.heads[layer] * kv_heads - 1e-9))

    def kv_share(self, length: int, kv_heads: int) -> float:
        """Share of the K,V bytes of ``length`` tokens, over all layers."""
        kept = sum(
            max(1, ceil(share * length - 1e-9)) * self.heads_kept(layer, kv_heads)
            for layer, share in enumerate(self.tokens)
        )
        return kept / (len(self.tokens) * length * kv_heads)


def schedule(shape: ModelShape, tokens: bool, save: float | None = None) -> Schedule:
    """Find what each layer keeps.

    Args:
        shape: of the model.
        tokens: whether tokens are pruned beside heads.
        save: share of the K,V bytes of long sequences to save. With token pruning, tokens and
            heads are dropped in the proportion of the defaults. None: the defaults.

    Raises:
        EvaluationError: a saving that cannot be reached.
    """
    if save is None:
        return _schedule(shape, tokens, 1.0)
    if not 0 < save < 1:
        raise EvaluationError(f"save is a share above 0 and below 1, not {save:g}")

    def saved(strength: float) -> float:
        return 1 - _schedule(shape, tokens, strength).kv_share(LONG, shape.kv_heads)

    low, high = 0.0, (MOST / TOKEN_DROP if tokens else 1 / HEAD_DROP)
    if saved(high) < save:
        raise EvaluationError(
            f"SpAtten's {'tokens and heads' if tokens else 'heads'} save at most "
            f"{saved(high):.1%} of this model's K,V bytes, not {save:.1%}"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(middle) >= save else (middle, high)
    return _schedule(shape, tokens, high)


def _schedule(shape: ModelShape, tokens: bool, strength: float) -> Schedule:
    """Defaults, with both drops multiplied by ``strength``."""
    return Schedule(
        _ramp(shape.layers, TOKEN_FRONT, TOKEN_DROP * strength if tokens else 0.0),
        _ramp(shape.layers, HEAD_FRONT, min(1.0, HEAD_DROP * strength)),
    )


def _ramp(layers: int, front: float, drop: float) -> tuple[float, ...]:
    """Keep 1 in the front layers, then linearly less, ``1 - drop`` in the last.

    The first layer is always of the front: nothing is known before it.
    """
    first = max(1, round(front * layers))
    steps = max(1, layers - first)
    return tuple(1 - drop * max(0, layer - first + 1) / steps for layer in range(layers))
