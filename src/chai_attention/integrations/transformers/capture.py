"""Seeing every layer's queries and keys while a model runs as it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.attention import is_enabled
from chai_attention.integrations.transformers.intervene import MaskedCall, replaced_attention


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention gets, rotary embedding included; without gradients.

    Attributes:
        layer: index of the layer.
        query: ``[B, H, S, D]``.
        key: ``[B, G, S, D]``.
        value: ``[B, G, S, Dv]``.
        scale: factor on the scores.
        softcap: cap on the scores, or None.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None


Callback = Callable[[AttentionCall, Tensor], None]


@contextmanager
def capture(model: PreTrainedModel, callback: Callback) -> Iterator[None]:
    """Call ``callback(call, out)`` at every layer's attention, out its result ``[B, S, H, Dv]``.

    The model's results do not change. For whole, unpadded sequences without a cache. ``out`` may
    be part of a graph: a hook on its gradient must not hold ``out`` itself.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or clustered heads are
            enabled (call ``disable(model)`` first).
    """
    if is_enabled(model):
        raise UnsupportedModelError("disable(model) before calibrating it")

    def attend(call: MaskedCall) -> Tensor:
        out = call.plain()
        q, k, v = (x.detach() for x in (call.query, call.key, call.value))
        callback(AttentionCall(call.layer, q, k, v, call.scale, call.softcap), out)
        return out

    with replaced_attention(model, attend):
        yield
