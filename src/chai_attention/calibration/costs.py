"""Costs of sharing and streaming heads over sample text: nothing is stored per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.backward import (
    Recomputation,
    gradients_of_activations,
    require_all,
    require_gradients,
)
from chai_attention.calibration.checks import not_finite
from chai_attention.calibration.pairs import (
    PairCosts,
    bands_of,
    factor,
    gradient_costs,
    value_costs,
)
from chai_attention.calibration.statistics import Later
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.intervene import LayerCall, capture
from chai_attention.integrations.transformers.logits import rows_at_once, summed_loss
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.integrations.transformers.modules import attention_modules, output_weight
from chai_attention.progress import Report, silent
from chai_attention.runtime.shape import describe

SCORES, VALUE, GRADIENT = "scores", "value", "gradient"
COSTS = (SCORES, VALUE, GRADIENT)


@dataclass(frozen=True)
class ExactWindow:
    """The exact recent window that costs are meant for; none by default.

    Attributes:
        recent: w, last keys that a head attends to with its own scores.
        sinks: s, first keys that it does.
        offsets: ``[L, H, H]`` float32, or None for zeros.
    """

    recent: int = 0
    sinks: int = 0
    offsets: Tensor | None = None


@dataclass(frozen=True)
class Costs:
    """Mean cost per token of what a head can do instead of keeping its scores.

    Attributes:
        sharing: ``[L, H, H]`` float64, head h (row) uses the scores of head r (column); zeros on
            the diagonal.
        streaming: ``[L, H]`` float64, head h sees local keys only; None without a window.
    """

    sharing: Tensor
    streaming: Tensor | None

    def plus(self, other: Costs, weight: float) -> Costs:
        """Add costs of the same exact window, of other text, so many times."""
        streaming = self.streaming
        if streaming is not None and other.streaming is not None:
            streaming = streaming + weight * other.streaming
        return Costs(self.sharing + weight * other.sharing, streaming)


def collect_costs(
    model: PreTrainedModel,
    sequences: Tensor,
    kind: str,
    *,
    exact: Sequence[ExactWindow] = (ExactWindow(),),
    counted: Tensor | None = None,
    batch_size: int = 4,
    sums: Tensor | None = None,
    start: int = 0,
    progress: Report = silent,
) -> list[Costs]:
    """Mean costs per token, for any number of exact recent windows from one run of the model.

    "value" is the squared error of the layer's output, ``|(P_r - P_h) V_h W_O,h|^2``. "gradient"
    is the squared first-order change of the loss, ``(g_h . (P_r - P_h) V_h)^2`` with g the
    gradient of the summed loss with respect to the head's output; it takes one backward pass per
    sequence, whose activations are recomputed layer by layer.

    Args:
        model: a supported model in float32, bfloat16 or float16; only the attention maps and
            costs are computed in float32.
        sequences: ``[N, S]`` tokens.
        kind: "value" or "gradient".
        exact: the exact recent windows to tell costs for, of different w and equal sinks; or one
            without.
        counted: ``[N, S]`` bool, tokens whose loss counts, by gradient costs only; None for all.
            Every sequence weighs the same, however few of its tokens count.
        batch_size: sequences per forward; fewer where they are long.
        sums: ``[len(exact), L, H, H + 1]`` float64 (see `empty_sums`), costs of the first
            ``start`` sequences, to be added to in place; None for zeros.
        start: sequences that ``sums`` holds already.
        progress: called with (sequences done, sequences in all) after every batch.

    Returns:
        Costs for each of ``exact``, in their order.

    Raises:
        CalibrationError: a gradient cost asked of a model that has no gradients, such as a
            quantised one, or costs that are no numbers.
        ValueError: an unknown kind, recent windows that cannot be told together, tokens that
            cannot count.
    """
    if kind not in (VALUE, GRADIENT):
        raise ValueError(f"kind is value or gradient, not {kind!r}")
    differentiate = kind == GRADIENT
    weights = _weights(sequences, counted, differentiate)
    recents, sinks = _recents(exact)
    places = sorted(range(len(exact)), key=lambda place: exact[place].recent)
    shape = describe(model)
    total = empty_sums(len(exact), shape.layers, shape.heads) if sums is None else sums
    roots = {} if differentiate else _output_roots(model)

    tables: dict[int, list[Tensor]] = {}  # offsets of a layer, where it is
    costs: list[tuple[int, Tensor]] = []  # of a batch's layers, each where it is
    first = start  # sequence at the beginning of the batch in the model

    def add(call: LayerCall, gradient: Tensor | None) -> None:
        group, device = call.query.shape[1] // call.value.shape[1], call.query.device
        if call.layer not in tables:
            tables[call.layer] = [
                _offset(exact[place], call.layer, shape.heads, device) for place in places
            ]
        offsets = tables[call.layer][: len(recents)]
        cost = torch.zeros(*total.shape[::2], total.shape[3], device=device, dtype=total.dtype)
        for row in range(call.query.shape[0]):
            value = call.value[row]  # [G, S, Dv]
            if differentiate:
                value = factor(value)
            else:
                value = value.float().repeat_interleave(group, dim=0) @ roots[call.layer]
                value = value.transpose(0, 1).contiguous().transpose(0, 1)  # [H, S, E]
            for bands in bands_of(
                call.query[row], call.key[row], call.scale, call.softcap, recents, sinks
            ):
                if gradient is None:
                    found = value_costs(bands, value, offsets)
                else:
                    slope = gradient[row, bands.rows].transpose(0, 1)  # [H, R, Dv]
                    found = gradient_costs(bands, value, slope, offsets)
                del bands  # its memory serves the next ones
                for place, each in zip(places, found, strict=True):
                    _add(cost[place], each, weights[first + row])
        costs.append((call.layer, cost))

    reached: set[int] = set()
    recomputed: dict[int, LayerCall] = {}  # of the layer that is differentiated

    def watch(call: LayerCall, out: Tensor) -> None:
        layer = call.layer
        if not differentiate:
            with torch.autocast(out.device.type, enabled=False):
                add(call, None)
            return
        if again.under_way:
            recomputed[layer] = call
            return
        # Q, K and V of a layer that is computed again need not be kept until then
        kept = None if again.expected else call

        def arrived(gradient: Tensor) -> None:
            reached.add(layer)
            with torch.autocast(gradient.device.type, enabled=False):
                add(recomputed.pop(layer) if kept is None else kept, gradient)

        if out.requires_grad:
            out.register_hook(arrived)

    if differentiate:
        require_gradients(model)
    again, device = Recomputation(), input_device(model)
    batch_size = rows_at_once(batch_size, sequences.shape[1])
    tokens = batch_size * sequences.shape[1]
    gradients = gradients_of_activations(model, tokens, again) if differentiate else torch.no_grad()
    with evaluating(model), capture(model, watch), gradients:
        for first in range(start, len(sequences), batch_size):
            rows = slice(first, first + batch_size)
            batch = sequences[rows].to(device)
            if differentiate:
                summed_loss(model, batch, None if counted is None else counted[rows]).backward()
                require_all(reached, shape.layers)
            else:
                model.base_model(batch, use_cache=False)
            for layer, cost in costs:  # devices have not waited for the host so far
                total[:, layer] += cost.cpu()
            costs.clear()
            progress(min(first + batch_size, len(sequences)), len(sequences))
    if not total.isfinite().all():
        raise not_finite(model, f"a {kind} cost")
    mean = total / sequences.numel()
    mean.diagonal(dim1=2, dim2=3).zero_()
    return [
        Costs(table[..., :-1].clone(), table[..., -1].clone() if window.recent else None)
        for table, window in zip(mean, exact, strict=True)
    ]


def empty_sums(exact: int, layers: int, heads: int) -> Tensor:
    """Zeros for the sums of `collect_costs`: sharing, and streaming in the last column."""
    return torch.zeros(exact, layers, heads, heads + 1, dtype=torch.float64)


def _add(total: Tensor, costs: PairCosts, weight: float) -> None:
    """Add a layer's costs to ``[H, H + 1]``."""
    total[:, :-1] += weight * costs.sharing
    if costs.streaming is not None:
        total[:, -1] += weight * costs.streaming


class OffsetStatistics:
    """How much larger the far part of head h is than that of head r, over sample text.

    The mean over tokens of the difference of the far scores' log-sum-exp; a token counts by how
    much the choice matters there, ``p (1 - p)`` with p head h's share of far keys.

    Args:
        layers: L.
        heads: H.
        exact: the exact recent windows to tell offsets for, of equal sinks.
    """

    def __init__(self, layers: int, heads: int, exact: Sequence[ExactWindow]):
        self._order = [window.recent for window in exact]
        self._recents, self._sinks = _recents(exact)
        shape = (len(self._recents), layers, heads)
        self._weighted = torch.zeros(*shape, heads, dtype=torch.float64)
        self._weights = torch.zeros(*shape, 1, dtype=torch.float64)

    def add(self, call: LayerCall, out: Tensor | None = None) -> Later:
        """See a layer's queries and keys, not its output; what is returned adds to the sums."""
        weighted, weights = (  # where the layer is
            torch.zeros_like(sums[:, call.layer], device=call.query.device)
            for sums in (self._weighted, self._weights)
        )
        for query, key in zip(call.query, call.key, strict=True):
            for bands in bands_of(query, key, call.scale, call.softcap, self._recents, self._sinks):
                for number, (local_lse, far_lse) in enumerate(bands.local_and_far_lse()):
                    share = torch.sigmoid(far_lse - local_lse)
                    weight = (share * (1 - share)).double()  # [H, R]
                    far = far_lse.double().masked_fill(weight == 0, 0.0)
                    own = (weight * far).sum(-1, keepdim=True)
                    weighted[number] += own - weight @ far.T
                    weights[number] += weight.sum(-1, keepdim=True)
                del bands  # its memory serves the next ones

        def later() -> None:
            self._weighted[:, call.layer] += weighted.cpu()
            self._weights[:, call.layer] += weights.cpu()

        return later

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums themselves, by name."""
        return {
            f"{name} {recent} {self._sinks}": tensor[number]
            for number, recent in enumerate(self._recents)
            for name, tensor in (("weighted", self._weighted), ("weights", self._weights))
        }

    @property
    def offsets(self) -> list[Tensor]:
        """``[L, H, H]`` float32 of every window, head h (row) using head r (column)."""
        found = (self._weighted / self._weights.clamp_min(1e-12)).float()
        found.diagonal(dim1=-2, dim2=-1).zero_()  # rounding apart it is
        return [found[self._recents.index(recent)] for recent in self._order]


def _recents(exact: Sequence[ExactWindow]) -> tuple[list[int], int]:
    """Every w, ascending, and the sinks of all; no w for a single empty `ExactWindow`."""
    recents = sorted(window.recent for window in exact)
    if recents == [0]:
        return [], 0
    different = len(set(recents)) == len(recents) and len({window.sinks for window in exact}) == 1
    if not recents or recents[0] < 1 or not different:
        raise ValueError(
            "recent windows that are told together need at least 1 token, no other of their size, "
            "and equal sinks"
        )
    return recents, exact[0].sinks


def _offset(window: ExactWindow, layer: int, heads: int, device: torch.device) -> Tensor:
    if window.offsets is None:
        return torch.zeros(heads, heads, device=device)
    return window.offsets[layer].float().to(device)


def _weights(sequences: Tensor, counted: Tensor | None, differentiate: bool) -> list[float]:
    """How much a token counts in each sequence, so that all sequences weigh the same."""
    if counted is None:
        return [1.0] * len(sequences)
    if not differentiate:
        raise ValueError("whose loss counts is known to gradient costs only")
    if counted.shape != sequences.shape or not bool(counted[:, 1:].any(1).all()):
        raise ValueError(
            f"counted needs the shape {tuple(sequences.shape)} of the sequences, and a token after "
            "the first in every row"
        )
    return (sequences.shape[1] / counted.sum(1).double()).tolist()


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
