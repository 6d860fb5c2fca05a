"""The modules of a model that attend, their output projections, and forwards in their place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chai_attention.errors import UnsupportedModelError
from chai_attention.runtime.shape import INTERFACE, describe, supported

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Find the modules that call the attention interface: layer index to module.

    Raises:
        UnsupportedModelError: not exactly one for every layer, or modules that do not call the
            interface, look both ways, or have attention sinks of their own.
    """
    shape = describe(model)
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is None or "Attention" not in type(module).__name__:
            continue
        if layer in found:
            raise UnsupportedModelError(
                f"layer {layer} of this {model.config.model_type} has several attention modules; "
                f"{supported()}"
            )
        _require_plain(module, shape.architecture)
        found[layer] = module
    if sorted(found) != list(range(shape.layers)):
        raise UnsupportedModelError(
            f"cannot find one attention module per layer in this {model.config.model_type}; "
            f"{supported()}"
        )
    return found


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks of attention and MLP that the decoder runs one after the other."""
    modules = attention_modules(model)
    parents = {id(child): module for module in model.modules() for child in module.children()}
    return [parents[id(modules[layer])] for layer in sorted(modules)]


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute by other functions inside a ``with`` block."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def output_projection(module: nn.Module) -> nn.Module:
    """Return the projection of the heads' outputs, W_O, of an attention module.

    Raises:
        UnsupportedModelError: there is none of a known name, or its weights are quantised or
            not in memory.
    """
    for name in OUTPUTS:
        projection = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if projection is None:
            continue
        if not isinstance(weight, Tensor) or weight.dtype not in PLAIN or weight.ndim != 2:
            raise UnsupportedModelError(
                "the output weights of this model are quantised: load it in bfloat16 or float32"
            )
        if weight.is_meta:
            raise UnsupportedModelError(
                "the output weights of this model are offloaded: load it without offloading"
            )
        return projection
    raise UnsupportedModelError(
        f"cannot find the output projection of {type(module).__name__} (none of "
        f"{', '.join(OUTPUTS)})"
    )


def is_transposed(projection: nn.Module) -> bool:
    """Whether the weight is stored ``[in, out]``, as GPT-2 does."""
    return isinstance(projection, Conv1D)


def output_weight(module: nn.Module) -> Tensor:
    """Return W_O ``[out, H * Dv]`` of an attention module."""
    projection = output_projection(module)
    weight: Tensor = projection.weight.detach()  # type: ignore[operator]
    return weight.T if is_transposed(projection) else weight


def _require_plain(module: nn.Module, architecture: str) -> None:
    """Refuse an attention module that the runtime would not reach, or would compute wrongly."""
    reason = None
    if INTERFACE not in inspect.unwrap(type(module).forward).__code__.co_names:
        reason = "does not go through transformers' attention interface"
    elif getattr(module, "is_causal", True) is False:
        reason = "looks both ways, not only back"
    elif hasattr(module, "sinks") or hasattr(module, "attention_sink_bias"):
        reason = "has learned attention sinks"
    if reason is not None:
        raise UnsupportedModelError(f"the attention of {architecture} {reason}; {supported()}")
