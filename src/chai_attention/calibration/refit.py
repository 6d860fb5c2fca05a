"""Output weights refit to clustered heads: closed form, layer by layer, no training.

Two streams of hidden states run side by side through the layers: the model's own, and that of the
clustered model whose earlier layers are refit already. In every layer, ridge regression towards
the old weights maps what now reaches the output projection to what the layer put out before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chai_attention.calibration.perplexity import token_loss
from chai_attention.errors import CalibrationError
from chai_attention.integrations.transformers.attention import NAME
from chai_attention.integrations.transformers.corrections import Corrections
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.enable import enabled
from chai_attention.integrations.transformers.logits import rows_at_once
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.integrations.transformers.modules import (
    attention_modules,
    decoder_layers,
    output_projection,
    output_weight,
)
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Report, silent
from chai_attention.runtime.shape import describe

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # relative to the mean square of the inputs
CHECK = 0.2  # share of the sequences on which the ridge is chosen
PASSES = 5  # runs of a sequence through all layers that a refit takes, roughly
TOKENS_PER_INPUT = 32  # more tokens than this, per input of the projection, are not used


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    profile: ClusterProfile,
    sequences: Tensor,
    *,
    kind: str,
    held_out: Tensor | None = None,
    batch_size: int = 8,
    progress: Report = silent,
) -> ClusterProfile:
    """Return the profile with output weights (or biases) refit to its clusters.

    "output" finds W' = W + E[(t - W x) x^T] (E[x x^T] + ridge)^-1 per layer, x being the heads'
    outputs in the clustered model and t the layer's attention output in the model as it was;
    the ridge is chosen on sequences left out of the sums. "bias" finds b = E[t - W x].

    Args:
        model: without clustered heads.
        profile: whose clusters the weights are refit to; a refit that it has is replaced.
        sequences: ``[N, S]`` tokens; no more are used than the regression needs.
        kind: "output" or "bias".
        held_out: ``[M, S]`` tokens. A refit that does not lower the loss on them is dropped,
            which the profile's provenance says. None keeps it unseen.
        batch_size: sequences per forward; fewer where they are long.
        progress: called with (layers done, layers in all).

    Raises:
        CalibrationError: an unknown kind, too few sequences, or clustered heads are enabled.
        UnsupportedModelError: output weights that cannot be found, or that are quantised.
    """
    if kind not in ("output", "bias"):
        raise CalibrationError(f"refit is output or bias, not {kind!r}")
    if model.config._attn_implementation == NAME:
        raise CalibrationError("disable(model) before refitting it")
    if len(sequences) < 2:
        raise CalibrationError("a refit needs at least 2 sequences")
    bare = replace(profile, refit=None, corrections=None)
    sequences = sequences[: sequences_needed(model, len(sequences), sequences.shape[1])]
    clustered = [k < describe(model).heads for k in bare.clusters]
    corrections: dict[str, Tensor] = {}
    with evaluating(model):
        streams = _Streams(model, bare, sequences, batch_size)
        for layer, shared in enumerate(clustered):
            if shared:
                name = f"layers.{layer}.{'weight' if kind == 'output' else 'bias'}"
                corrections[name] = streams.fit(layer, kind)
                streams.advance(layer, {name: corrections[name]})
            else:
                streams.advance(layer, {})
            progress(layer + 1, len(clustered))
        if not corrections:
            return bare
        found = replace(
            bare,
            refit={"kind": kind},
            corrections={name: tensor.cpu() for name, tensor in corrections.items()},
        )
        if held_out is not None:
            losses = []
            for candidate in (bare, found):
                with enabled(model, candidate):
                    losses.append(token_loss(model, held_out, batch_size=batch_size).mean)
            if losses[1] >= losses[0]:
                note = {**(bare.provenance or {}), "refit": f"{kind} did not help: dropped"}
                return replace(bare, provenance=note)
    return found


def sequences_needed(model: PreTrainedModel, sequences: int, length: int) -> int:
    """How many of so many sequences of so many tokens a refit uses."""
    inputs = output_weight(attention_modules(model)[0]).shape[1]
    return max(2, min(sequences, TOKENS_PER_INPUT * inputs // length))


class _Streams:
    """Hidden states of all sequences before a layer, in the model and in the clustered model."""

    def __init__(
        self, model: PreTrainedModel, profile: ClusterProfile, sequences: Tensor, batch_size: int
    ):
        self._model = model
        self._profile = profile
        self._modules = attention_modules(model)
        layers = decoder_layers(model)
        size = min(rows_at_once(batch_size, sequences.shape[1]), len(sequences))
        # masks and positions are kept from one forward, so batches are of one size
        batches = sequences[: len(sequences) // size * size].to(input_device(model)).split(size)
        self._plain_calls, _ = _observed(model, layers, batches[0])
        with enabled(model, profile):
            self._shared_calls, _ = _observed(model, layers, batches[0])
        self._plain = [_observed(model, layers[:1], batch)[1] for batch in batches]
        self._shared = list(self._plain)

    def fit(self, layer: int, kind: str) -> Tensor:
        """New weight ``[out, in]`` or bias ``[out]`` of a layer, from both streams."""
        projection = output_projection(self._modules[layer])
        weight = output_weight(self._modules[layer]).float()
        targets = self._attention_outputs(layer, projection)
        check = max(1, round(CHECK * len(targets))) if len(targets) > 1 else 0
        sums = [_Sums(weight), _Sums(weight)]  # to fit, to check
        bias = getattr(projection, "bias", None)
        with enabled(self._model, self._profile):
            for index, hidden in enumerate(self._shared):
                with _watched(projection) as seen:
                    self._shared_calls[layer](hidden)
                target = targets[index] if bias is None else targets[index] - bias
                sums[index >= len(targets) - check].add(seen["inputs"], target)
        if kind == "bias":
            total = sums[0].residual + sums[1].residual
            return (total / (sums[0].count + sums[1].count)).float()
        return weight + _solve(sums[0], sums[1])

    def advance(self, layer: int, corrections: dict[str, Tensor]) -> None:
        """Run both streams through a layer, with its new weights in the clustered one."""
        self._plain = [self._plain_calls[layer](hidden) for hidden in self._plain]
        with enabled(self._model, self._profile):
            applied = Corrections(self._modules, corrections)
            try:
                self._shared = [self._shared_calls[layer](hidden) for hidden in self._shared]
            finally:
                applied.undo()

    def _attention_outputs(self, layer: int, projection: nn.Module) -> list[Tensor]:
        """What the layer's attention puts out in the model as it was, by batch."""
        outputs = []
        for hidden in self._plain:
            with _watched(projection) as seen:
                self._plain_calls[layer](hidden)
            outputs.append(seen["outputs"])
        return outputs


_Call = Callable[[Tensor], Tensor]  # a decoder layer with all but the hidden states given


class _Enough(Exception):  # noqa: N818
    """Ends a forward whose rest is not needed."""


def _observed(
    model: PreTrainedModel, layers: Sequence[nn.Module], batch: Tensor
) -> tuple[list[_Call], Tensor]:
    """These first layers as they are called, and the hidden states before the first of them."""
    calls: list[_Call] = []
    first: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        options = dict(kwargs)
        hidden = args[0] if args else options.pop("hidden_states")
        first.append(hidden)

        def call(hidden: Tensor) -> Tensor:
            out = module(hidden, *args[1:], **options)
            return out[0] if isinstance(out, tuple) else out

        calls.append(call)
        if len(calls) == len(layers):
            raise _Enough

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        model.base_model(batch, use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return calls, first[0]


@contextmanager
def _watched(projection: nn.Module) -> Iterator[dict[str, Tensor]]:
    """See what goes through a projection in the block: "inputs" and "outputs", ``[N, ...]``."""
    seen: dict[str, Tensor] = {}

    def look(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        seen["inputs"] = args[0].detach().flatten(0, 1).float()
        seen["outputs"] = out.detach().flatten(0, 1).float()

    hook = projection.register_forward_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


class _Sums:
    """Sums over tokens that the regression needs, in float64."""

    def __init__(self, weight: Tensor):
        out, inputs = weight.shape
        options: dict[str, Any] = {"dtype": torch.float64, "device": weight.device}
        self._weight = weight
        self.square = torch.zeros(inputs, inputs, **options)  # of x x^T
        self.cross = torch.zeros(out, inputs, **options)  # of r x^T, r = t - W x
        self.residual = torch.zeros(out, **options)
        self.count = 0

    def add(self, inputs: Tensor, target: Tensor) -> None:
        """Add tokens: ``inputs [N, in]``, ``target [N, out]``."""
        rest = target - inputs @ self._weight.T
        self.square += (inputs.T @ inputs).double()
        self.cross += (rest.T @ inputs).double()
        self.residual += rest.double().sum(0)
        self.count += len(inputs)


def _solve(fit: _Sums, check: _Sums) -> Tensor:
    """Change of the weight ``[out, in]``: the ridge that does best on the check's tokens."""
    square, cross = fit.square + check.square, fit.cross + check.cross
    if not check.count:
        return _ridge(square, cross, RIDGES[-1]).float()

    def error(ridge: float) -> float:
        change = _ridge(fit.square, fit.cross, ridge)
        # |r - D x|^2 summed, without the constant
        return float(((change @ check.square) * change).sum() - 2 * (change * check.cross).sum())

    best = min(RIDGES, key=error)
    return _ridge(square, cross, best).float()


def _ridge(square: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """``cross (square + ridge mean(diagonal) I)^-1``."""
    damped = square.clone()
    damped.diagonal().add_(ridge * square.diagonal().mean().clamp_min(1e-30))
    solution: Tensor = torch.linalg.solve(damped, cross.T).T
    return solution
