"""The attention and mask functions that transformers' interfaces call for enabled models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from chai_attention.errors import CacheError, UnsupportedModelError
from chai_attention.integrations.transformers.devices import PADDING_TAG, launched_on
from chai_attention.integrations.transformers.layer import ClusteredLayer
from chai_attention.integrations.transformers.memory import LAYER_TAG
from chai_attention.integrations.transformers.modes import (
    as_attended,
    eager,
    no_autocast,
    require_one_dtype,
    without_gradients,
)
from chai_attention.integrations.transformers.padding import Padding, require_cover
from chai_attention.integrations.transformers.plain import plain_attention
from chai_attention.integrations.transformers.static_layer import StaticClusteredLayer
from chai_attention.runtime.plan import LayerPlan

NAME = "chai"
PLAN_ATTRIBUTE = "_chai_plan"


def is_enabled(model: nn.Module) -> bool:
    """Whether clustered heads are enabled for a model, or for a part of it."""
    return any(hasattr(module, PLAN_ATTRIBUTE) for module in model.modules())


@eager
def padding_mask(
    *args: Any,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the ``[B, S]`` padding of plain causal attention as it is, not read on the host.

    It is a tensor of this forward alone, so that layers may keep on it what they find out: the
    caller may fill the memory of its own mask with another one for the next forward.

    Any other mask (a sliding window's) is made as for torch's fused attention.
    """
    if mask_function is not causal_mask_function:
        return sdpa_mask(
            *args, mask_function=mask_function, attention_mask=attention_mask, **kwargs
        )
    if attention_mask is None:
        return None
    mask = attention_mask.view(attention_mask.shape)
    setattr(mask, PADDING_TAG, [])
    return mask


@eager
def clustered_attention(
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
    """Attend with clustered heads; the signature is that of transformers' interface.

    Args:
        module: attention module of an enabled model.
        query: ``[B, H, Q, D]`` of the new tokens.
        key: ``[B, G, Q, D]`` of the new tokens, marked by `ClusteredLayer.update` if cached.
        value: ``[B, G, Q, Dv]`` of the new tokens.
        attention_mask: what `padding_mask` made.
        dropout: must be 0.
        scaling: factor on the scores, by default ``D ** -0.5``.
        softcap: cap on the scores, or None.
        kwargs: what else a model family passes; what would change the result is refused.

    Returns:
        ``[B, Q, H, Dv]`` and None for the attention weights.

    Raises:
        UnsupportedModelError: a feature that clustered heads do not have.
        CacheError: a cache that is not a `ClusteredCache`.
    """
    plan: LayerPlan | None = getattr(module, PLAN_ATTRIBUTE, None)
    if plan is None:
        raise UnsupportedModelError(
            "this model was made with the very config of one that has clustered heads enabled: "
            "make it with a copy, copy.deepcopy(model.config)"
        )
    _refuse_features(module, dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = getattr(key, LAYER_TAG, None)
    query, key, value = (as_attended(states) for states in (query, key, value))
    require_one_dtype(query, key, value)
    if not plan.full_attention:
        with no_autocast(query):
            return plain_attention(
                module, query, key, value, attention_mask, scale, softcap, kwargs
            ), None
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedModelError(
            "clustered heads support causal attention with padding (a 2D attention_mask); a custom "
            "4D mask, packed sequences or a bidirectional prefix need the model without CHAI"
        )
    if kwargs.get("sliding_window") is not None:
        raise UnsupportedModelError(
            f"layer {plan.layer} turned out to be a sliding-window layer at run time; leave it "
            f"unclustered in the profile and report the model family"
        )
    if layer is None:
        layer = _uncached(plan, query, key, value)
    queries = query.shape[2]
    if isinstance(layer, StaticClusteredLayer):
        padding = layer.begin(queries)  # its cache has taken the mask already
    else:
        padding = _padding_of(attention_mask, query, layer.get_seq_length() + queries)
    with torch.no_grad(), no_autocast(query), launched_on(query):
        out = layer.attend(query, padding, scale, softcap)
    return without_gradients(out, query, key, value), None


def _refuse_features(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise for every option that would silently be ignored otherwise."""
    if dropout and module.training:
        raise UnsupportedModelError("clustered heads are for inference: call model.eval()")
    if kwargs.get("is_causal") is False:
        raise UnsupportedModelError("clustered heads need causal attention")
    for name in ("s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"clustered heads do not support {name!r} in attention")
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "clustered heads never hold the attention weights of all heads: run without "
            "output_attentions, or disable CHAI"
        )


def _uncached(plan: LayerPlan, query: Tensor, key: Tensor, value: Tensor) -> ClusteredLayer:
    """Return a layer for one forward without a cache."""
    if key.shape[2] != query.shape[2]:
        raise CacheError(
            "this forward brought a cache that is not a ClusteredCache: leave out "
            "past_key_values, or pass ClusteredCache(model, profile)"
        )
    layer = ClusteredLayer(plan)
    layer.expect()
    layer.update(key, value)
    return layer


def _padding_of(mask: Tensor | None, query: Tensor, length: int) -> Padding:
    """Return the padding tables of a forward; made once for all layers if the mask is ours."""
    if mask is None:
        return Padding(None, query.shape[0], length, query.device)
    if mask.shape[0] != query.shape[0]:
        raise CacheError(
            f"attention_mask is for {mask.shape[0]} sequences, but the input has "
            f"{query.shape[0]}: give a row for each"
        )
    require_cover(mask, length)
    known: list[Padding] = getattr(mask, PADDING_TAG, [])  # what is not ours remembers nothing
    for padding in known:
        if padding.length == length:
            return padding
    valid: Tensor | None = mask[:, :length].bool()
    if bool(mask[:, :length].all()):
        valid = None
    padding = Padding(valid, query.shape[0], length, query.device)
    known.append(padding)
    return padding
