"""Seeing every layer's queries and keys while a model runs as it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.plain import plain_attention
from chai_attention.integrations.transformers.support import attention_modules

Callback = Callable[[int, Tensor, Tensor, float, "float | None"], None]

_numbers = count()  # each capture registers under a name of its own, so that they nest


@contextmanager
def capture(model: PreTrainedModel, callback: Callback) -> Iterator[None]:
    """Call ``callback(layer, query, key, scale, softcap)`` at every layer's attention.

    ``query [B, H, S, D]`` and ``key [B, G, S, D]`` are what attention gets, rotary embedding
    included. The model's results do not change. For whole, unpadded sequences without a cache.

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
        with torch.no_grad():
            callback(layers[module], query, key, scale, softcap)
        out = plain_attention(module, query, key, value, attention_mask, scale, softcap, kwargs)
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
