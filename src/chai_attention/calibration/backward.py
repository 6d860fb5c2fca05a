"""Gradients of a model's attention outputs, with activations recomputed where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import enable_grad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from chai_attention.errors import CalibrationError, UnsupportedModelError
from chai_attention.integrations.transformers.devices import has_offloaded_weights
from chai_attention.integrations.transformers.modules import (
    attention_modules,
    decoder_layers,
    output_projection,
    replaced_forwards,
)
from chai_attention.integrations.transformers.room import ACTIVATIONS

KEEP_BYTES = 3e9  # activations of a batch that are kept rather than computed twice


class Recomputation:
    """Whether the layers' activations are computed again in the backward pass, and are just now."""

    expected = False
    under_way = False


@contextmanager
def gradients_of_activations(
    model: PreTrainedModel, tokens: int, again: Recomputation
) -> Iterator[None]:
    """Let gradients flow to the layers' activations only.

    These are recomputed layer by layer where those of a batch would fill memory.

    Args:
        model: with weights that have gradients, see `require_gradients`.
        tokens: of a batch.
        again: told whether they are recomputed.
    """
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    embedding = model.get_input_embeddings()
    layers = decoder_layers(model)
    width = embedding.weight.shape[1] * ACTIVATIONS * embedding.weight.element_size()
    if tokens * len(layers) * width < KEEP_BYTES:
        layers = []
    again.expected = bool(layers)
    hook = embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
    checkpointed = {layer: _checkpointed(layer.forward, again) for layer in layers}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with replaced_forwards(checkpointed), enable_grad():
            yield
    finally:
        hook.remove()
        for parameter, wanted_gradient in wanted.items():
            parameter.requires_grad_(wanted_gradient)


def _checkpointed(forward: Callable[..., Any], again: Recomputation) -> Callable[..., Any]:
    """Return ``forward`` with its inner activations recomputed in the backward pass."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            forward, *args, use_reentrant=False,
            context_fn=lambda: (nullcontext(), _told(again)), **kwargs,
        )  # fmt: skip

    return run


@contextmanager
def _told(again: Recomputation) -> Iterator[None]:
    """The region in which activations are computed again; it may end with an exception."""
    again.under_way = True
    try:
        yield
    finally:
        again.under_way = False


def require_gradients(model: PreTrainedModel) -> None:
    """Refuse a model whose matrix products have no gradients."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        reason = "which this quantised model does not have: load it in bfloat16 or float32"
    elif has_offloaded_weights(model):
        reason = (
            "for which all weights have to be on a device, and some of this model are offloaded: "
            "give --max-memory more of the GPUs"
        )
    elif any(parameter.is_inference() for parameter in model.parameters()):
        reason = (
            "which weights that were made under torch.inference_mode do not have: load the model "
            "outside of it"
        )
    else:
        return
    others = "--cost value or --cost scores"
    try:
        for module in attention_modules(model).values():
            output_projection(module)
    except UnsupportedModelError:  # the errors of values are those of weights that can be read
        others = "--cost scores"
    raise CalibrationError(f"cost gradient needs a backward pass, {reason}, or use {others}")


def require_all(reached: set[int], layers: int) -> None:
    """Refuse costs of layers that no gradient has reached: they would count as nothing."""
    missed = sorted(set(range(layers)) - reached)
    if missed:
        raise CalibrationError(
            f"no gradient reaches the attention of layer {missed[0]}: its projections, or those "
            "behind it, have no backward pass, as quantised ones may not. Load the model in "
            "bfloat16 or float32, or use --cost scores"
        )
