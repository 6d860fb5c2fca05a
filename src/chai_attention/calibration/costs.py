"""Costs of all pairs of heads, accumulated over sample text: nothing is stored per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from chai_attention.calibration.checks import not_finite
from chai_attention.calibration.pairs import gradient_cost, maps_of, value_cost
from chai_attention.errors import CalibrationError, UnsupportedModelError
from chai_attention.integrations.transformers.capture import AttentionCall, capture
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.integrations.transformers.support import (
    attention_modules,
    decoder_layers,
    describe,
    output_projection,
    output_weight,
)

SCORES, VALUE, GRADIENT = "scores", "value", "gradient"
COSTS = (SCORES, VALUE, GRADIENT)

ACTIVATIONS = 40  # of a layer and token, in hidden sizes, roughly
KEEP_BYTES = 3e9  # activations of a batch that are kept rather than computed twice

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Near:
    """The exact recent window that costs are meant for; none by default.

    Attributes:
        recent: w, last keys that a head attends to with its own scores.
        sinks: s, first keys that it does.
        offsets: ``[L, H, H]`` float32, or None for zeros.
    """

    recent: int = 0
    sinks: int = 0
    offsets: Tensor | None = None


def collect_costs(
    model: PreTrainedModel,
    windows: Tensor,
    kind: str,
    *,
    near: Near = Near(),
    batch_size: int = 4,
    sums: Tensor | None = None,
    start: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Mean cost per token that head h uses the attention map of head r.

    "value" is the squared error of the layer's output, ``|(P_r - P_h) V_h W_O,h|^2``. "gradient"
    is the squared first-order change of the loss, ``(g_h . (P_r - P_h) V_h)^2`` with g the
    gradient of the summed loss with respect to the head's output; it takes one backward pass per
    sequence, whose activations are recomputed layer by layer.

    Args:
        model: a supported model in float32, bfloat16 or float16; only the attention maps and
            costs are computed in float32.
        windows: ``[N, S]`` tokens.
        kind: "value" or "gradient".
        near: the exact recent window in force.
        batch_size: windows per forward.
        sums: ``[L, H, H]`` float64, costs of the first ``start`` windows, to be added to in place;
            None for zeros.
        start: windows that ``sums`` holds already.
        progress: called with (windows done, windows in all) after every batch.

    Returns:
        ``[L, H, H]`` float64, rows h, columns r, zeros on the diagonal.

    Raises:
        CalibrationError: a gradient cost asked of a model that has no gradients, such as a
            quantised one, or costs that are no numbers.
    """
    if kind not in (VALUE, GRADIENT):
        raise ValueError(f"kind is value or gradient, not {kind!r}")
    shape = describe(model)
    total = sums
    if total is None:
        total = torch.zeros(shape.layers, shape.heads, shape.heads, dtype=torch.float64)
    offsets = torch.zeros(total.shape) if near.offsets is None else near.offsets.float()
    roots = _output_roots(model) if kind == VALUE else {}

    def add(call: AttentionCall, gradient: Tensor | None) -> None:
        group = call.query.shape[1] // call.value.shape[1]
        offset = offsets[call.layer].to(call.query.device)
        cost = torch.zeros(offset.shape, device=offset.device, dtype=torch.float64)
        for row in range(call.query.shape[0]):
            value = call.value[row].float().repeat_interleave(group, dim=0)  # [H, S, Dv]
            if kind == VALUE:
                value = value @ roots[call.layer]
            for maps in maps_of(
                call.query[row],
                call.key[row],
                call.scale,
                call.softcap,
                near.recent,
                near.sinks,
            ):
                if gradient is None:
                    cost += value_cost(maps, value, offset)
                else:
                    slope = gradient[row, maps.rows].float().transpose(0, 1)  # [H, R, Dv]
                    cost += gradient_cost(maps, value, slope, offset)
        total[call.layer] += cost.cpu()

    reached: set[int] = set()

    def arrived(call: AttentionCall, gradient: Tensor) -> None:
        reached.add(call.layer)
        with torch.autocast(gradient.device.type, enabled=False):
            add(call, gradient)

    def watch(call: AttentionCall, out: Tensor) -> None:
        if kind == VALUE:
            with torch.autocast(out.device.type, enabled=False):
                add(call, None)
        elif out.requires_grad:
            out.register_hook(lambda gradient: arrived(call, gradient))

    differentiate = kind == GRADIENT
    if differentiate:
        _require_gradients(model)
    tokens = batch_size * windows.shape[1]
    gradients = _gradients_of_activations(model, tokens) if differentiate else torch.no_grad()
    with evaluating(model), capture(model, watch), gradients:
        for first in range(start, len(windows), batch_size):
            batch = windows[first : first + batch_size].to(model.device)
            if differentiate:
                _summed_loss(model, batch).backward()
                _require_all(reached, shape.layers)
            else:
                model.base_model(batch, use_cache=False)
            if progress is not None:
                progress(min(first + batch_size, len(windows)), len(windows))
    if not total.isfinite().all():
        raise not_finite(model, f"a {kind} cost")
    mean = total / windows.numel()
    mean.diagonal(dim1=1, dim2=2).zero_()
    return mean


class OffsetStatistics:
    """How much larger the far part of head h is than that of head r, over sample text.

    The mean over tokens of the difference of the far scores' log-sum-exp; a token counts by how
    much the choice matters there, ``p (1 - p)`` with p head h's share of far keys.
    """

    def __init__(self, layers: int, heads: int, near: Near):
        self.near = near
        self._weighted = torch.zeros(layers, heads, heads, dtype=torch.float64)
        self._weights = torch.zeros(layers, heads, 1, dtype=torch.float64)

    def add(self, call: AttentionCall, out: Tensor | None = None) -> None:
        """Add a layer's queries and keys; the output is not needed."""
        near = self.near
        for query, key in zip(call.query, call.key, strict=True):
            for maps in maps_of(query, key, call.scale, call.softcap, near.recent, near.sinks):
                assert maps.far_lse is not None
                share = torch.sigmoid(maps.far_lse - maps.near_lse)
                weight = (share * (1 - share)).double()  # [H, R]
                far = maps.far_lse.double().masked_fill(weight == 0, 0.0)
                own = (weight * far).sum(-1, keepdim=True)
                self._weighted[call.layer] += (own - weight @ far.T).cpu()
                self._weights[call.layer] += weight.sum(-1, keepdim=True).cpu()

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums themselves, by name."""
        return {
            f"{name} {self.near.recent} {self.near.sinks}": tensor
            for name, tensor in (("weighted", self._weighted), ("weights", self._weights))
        }

    @property
    def offsets(self) -> Tensor:
        """``[L, H, H]`` float32, head h (row) using head r (column)."""
        return (self._weighted / self._weights.clamp_min(1e-12)).float()


def _summed_loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Negative log-likelihood of all tokens but the first of each row, nats."""
    logits = model(batch, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
    )


def _require_gradients(model: PreTrainedModel) -> None:
    """Refuse a model whose matrix products have no gradients."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise CalibrationError(
            "cost gradient needs a backward pass, which this quantised model does not have: load "
            f"it in bfloat16 or float32, or use {_without_gradients(model)}"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise CalibrationError(
            "cost gradient needs a backward pass, which weights that were made under "
            "torch.inference_mode do not have: load the model outside of it, or use "
            f"{_without_gradients(model)}"
        )


def _without_gradients(model: PreTrainedModel) -> str:
    """Costs that this model can be calibrated by, without a backward pass."""
    try:
        for module in attention_modules(model).values():
            output_projection(module)
    except UnsupportedModelError:  # the errors of values are those of weights that can be read
        return "--cost scores"
    return "--cost value or --cost scores"


def _require_all(reached: set[int], layers: int) -> None:
    """Refuse costs of layers that no gradient has reached: they would count as nothing."""
    missed = sorted(set(range(layers)) - reached)
    if missed:
        raise CalibrationError(
            f"no gradient reaches the attention of layer {missed[0]}: its projections, or those "
            "behind it, have no backward pass, as quantised ones may not. Load the model in "
            "bfloat16 or float32, or use --cost scores"
        )


def _output_roots(model: PreTrainedModel) -> dict[int, Tensor]:
    """Per layer ``[H, Dv, Dv]``: M with ``|v M| = |v W_O|`` for the output weights of each head."""
    heads = describe(model).heads
    roots = {}
    for layer, module in attention_modules(model).items():
        weight = output_weight(module).detach().float()  # [out, H * Dv]
        parts = weight.view(weight.shape[0], heads, -1).permute(1, 2, 0)  # [H, Dv, out]
        values, vectors = torch.linalg.eigh(parts @ parts.mT)
        roots[layer] = vectors * values.clamp_min(0).sqrt()[:, None, :]
    return roots


@contextmanager
def _gradients_of_activations(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Let gradients flow to the layers' activations only.

    These are recomputed layer by layer where those of a batch of ``tokens`` would fill memory.
    """
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    embedding = model.get_input_embeddings()
    layers = decoder_layers(model)
    width = embedding.weight.shape[1] * ACTIVATIONS * embedding.weight.element_size()
    if tokens * len(layers) * width < KEEP_BYTES:
        layers = []
    hook = embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
    replaced = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for layer in layers:
            layer.forward = _checkpointed(layer.forward)
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for layer, before in replaced.items():
            del layer.forward
            if before is not None:
                layer.forward = before
        for parameter, wanted_gradient in wanted.items():
            parameter.requires_grad_(wanted_gradient)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward`` with its inner activations recomputed in the backward pass."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
