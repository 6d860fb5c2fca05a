"""Seeing every layer's queries and keys while a model runs as it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.plain import plain_attention
from chai_attention.integrations.transformers.support import attention_modules


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

_numbers = count()  # each capture registers under a name of its own, so that they nest


@contextmanager
def capture(model: PreTrainedModel, callback: Callback) -> Iterator[None]:
    """Call ``callback(call, out)`` at every layer's attention, out its result ``[B, S, H, Dv]``.

    The model's results do not change. For whole, unpadded sequences without a cache. ``out`` may
    be part of a graph: a hook on its gradient must not hold ``out`` itself.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or clustered heads are
            enabled (call ``disable(model)`` first).
    """
    layers = {module: layer for layer, module in attention_modules(model).items()}
    before = model.config._attn_implementation
    if before == "chai":
        raise UnsupportedModelError("disable(model) before calibrating it")

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = plain_attention(module, query, key, value, attention_mask, scale, softcap, kwargs)
        q, k, v = query.detach(), key.detach(), value.detach()
        callback(AttentionCall(layers[module], q, k, v, scale, softcap), out)
        return out, None

    name = f"chai_capture_{next(_numbers)}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
