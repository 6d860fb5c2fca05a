"""Watching or replacing a model's attention for the time of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import sdpa_mask

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.attention import is_enabled
from chai_attention.integrations.transformers.modules import attention_modules, output_projection
from chai_attention.integrations.transformers.plain import plain_attention
from chai_attention.integrations.transformers.switch import switched
from chai_attention.runtime.shape import describe

_numbers = count()  # every replacement registers under a name of its own, so that they nest


@dataclass(frozen=True)
class LayerCall:
    """What one layer's attention gets, rotary embedding included.

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


@dataclass(frozen=True)
class MaskedCall(LayerCall):
    """A `LayerCall` with its mask, for a function that attends in the layer's place.

    Attributes:
        mask: ``[B, 1, Q, S]`` bool, True for keys that are seen; None for causal attention
            without padding.
        plain: computes the model's own attention, ``[B, Q, H, Dv]``.
    """

    mask: Tensor | None
    plain: Callable[[], Tensor]


Callback = Callable[[LayerCall, Tensor], None]


@contextmanager
def replaced_attention(
    model: PreTrainedModel, attention: Callable[[MaskedCall], Tensor]
) -> Iterator[None]:
    """Let ``attention(call)`` compute every layer's attention, ``[B, Q, H, Dv]``.

    Layers are called in their order, once per forward.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or clustered heads are
            enabled.
    """
    layers = {module: layer for layer, module in attention_modules(model).items()}
    _refuse_enabled(model)

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

        def plain() -> Tensor:
            return plain_attention(
                module, query, key, value, attention_mask, scale, softcap, kwargs
            )

        call = MaskedCall(layers[module], query, key, value, scale, softcap, attention_mask, plain)
        return attention(call), None

    with switched(model, layers, f"chai_replaced_{next(_numbers)}", attend, sdpa_mask):
        yield


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
        callback(LayerCall(call.layer, q, k, v, call.scale, call.softcap), out)
        return out

    with replaced_attention(model, attend):
        yield


@contextmanager
def edited_heads(
    model: PreTrainedModel,
    edit: Callable[[int, Tensor], Tensor | None],
    see_input: Callable[[int, Tensor], None] | None = None,
) -> Iterator[None]:
    """Let ``edit(layer, out)`` replace the heads' outputs before the output projection.

    Args:
        model: a supported causal language model; its attention runs as it always does.
        edit: gets ``[B, Q, H, Dv]``, returns the same shape, or None to leave it as it is.
        see_input: called before every layer's attention with (layer, its input ``[B, Q, E]``,
            normalised where the family does).

    Raises:
        UnsupportedModelError: the model's attention or output projection cannot be reached, or
            clustered heads are enabled.
    """
    heads = describe(model).heads
    modules = attention_modules(model)
    projections = {layer: output_projection(module) for layer, module in modules.items()}
    _refuse_enabled(model)

    def before_projection(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            flat = args[0]  # [B, Q, H * Dv]
            changed = edit(layer, flat.unflatten(-1, (heads, -1)))
            return None if changed is None else (changed.flatten(-2), *args[1:])

        return hook

    def before_attention(layer: int, see: Callable[[int, Tensor], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(layer, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        return hook

    with ExitStack() as hooks:
        for layer, module in modules.items():
            if see_input is not None:
                seen = module.register_forward_pre_hook(
                    before_attention(layer, see_input), with_kwargs=True
                )
                hooks.callback(seen.remove)
            edited = projections[layer].register_forward_pre_hook(before_projection(layer))
            hooks.callback(edited.remove)
        yield


def _refuse_enabled(model: PreTrainedModel) -> None:
    if is_enabled(model):
        raise UnsupportedModelError("clustered heads are enabled: disable(model) first")
