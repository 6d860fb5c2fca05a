"""Projections without the rows of removed heads: put into a model and taken out again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from chai_attention.integrations.transformers.cuts import Cut, WholeProjectionsError, find_cuts
from chai_attention.integrations.transformers.plan import LayerPlan
from chai_attention.integrations.transformers.support import describe, is_transposed

logger = logging.getLogger("chai_attention")


class Projections:
    """Leaves removed heads' rows of W_Q and W_K out while it is in force.

    A static membership never asks for them. The parameters stay the same objects with fewer rows;
    the rows taken out wait in the CPU's memory, so that `undo` restores every bit, on the device
    and in the dtype that the model has by then. What `cuts` cannot cut stays whole, and the log
    says why (level info).

    Args:
        model: the model.
        modules: attention module of every layer.
        plans: plan of every layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Mapping[int, nn.Module],
        plans: Sequence[LayerPlan],
    ):
        self._layers: list[list[_CutProjection]] = []
        work = _find(model, modules, plans)
        try:
            for cuts in work:
                self._layers.append([])
                for cut in cuts:
                    self._layers[-1].append(_CutProjection(cut))
        except BaseException:  # such as no memory for a layer in the middle
            self.undo()
            raise

    @property
    def saved_bytes(self) -> int:
        """Bytes of weights and biases that are off the model's device."""
        return sum(cut.saved_bytes for layer in self._layers for cut in layer)

    @property
    def changed(self) -> list[nn.Module]:
        """The projections that lack rows."""
        return [cut.projection for layer in self._layers for cut in layer]

    def undo(self) -> None:
        """Put the rows back; if memory runs out, what is left is restored by the next call.

        A layer is restored as a whole or not at all, and runs rightly either way.
        """
        while self._layers:
            whole = [cut.whole() for cut in self._layers[-1]]
            for cut, tensors in zip(self._layers.pop(), whole, strict=True):
                cut.put_back(tensors)


class _CutProjection:
    """One projection with fewer rows."""

    def __init__(self, cut: Cut):
        self.cut = cut
        self.projection: Any = cut.projection
        self._removed: dict[str, Tensor] = {}
        kept = {}
        for name, parameter, axis in self._parameters():
            heads = parameter.data.unflatten(axis, (cut.heads, -1))
            kept[name] = _pick(heads, cut.kept, axis).flatten(axis, axis + 1)
            self._removed[name] = _pick(heads, cut.removed, axis).cpu()
            size = heads.shape[axis + 1]
        spread = None
        if cut.places is not None:
            places = torch.tensor(cut.places, device=self.projection.weight.device)
            spread = _Spread(places, size)
        # nothing has been changed so far, and nothing fails from here on
        self._set(kept, len(cut.kept) * size)
        self._hooks: list[RemovableHandle] = []
        if spread is not None:
            self._hooks.append(self.projection.register_forward_hook(spread))

    @property
    def saved_bytes(self) -> int:
        """Bytes of the removed rows in the model's dtype."""
        size: int = self.projection.weight.dtype.itemsize
        return sum(tensor.numel() for tensor in self._removed.values()) * size

    def whole(self) -> dict[str, Tensor]:
        """All rows of weight and bias; the projection is not changed."""
        order = torch.tensor(self.cut.kept + self.cut.removed).argsort()
        tensors = {}
        for name, parameter, axis in self._parameters():
            kept = parameter.data.unflatten(axis, (len(self.cut.kept), -1))
            heads = torch.cat([kept, self._removed[name].to(kept)], axis)
            tensors[name] = heads.index_select(axis, order.to(heads.device)).flatten(axis, axis + 1)
        return tensors

    def put_back(self, tensors: dict[str, Tensor]) -> None:
        """Be a whole projection again."""
        for hook in self._hooks:
            hook.remove()
        self._set(tensors, tensors["weight"].shape[is_transposed(self.projection)])

    def _parameters(self) -> list[tuple[str, nn.Parameter, int]]:
        """Name, parameter and the axis of its rows."""
        found = [("weight", self.projection.weight, int(is_transposed(self.projection)))]
        if self.projection.bias is not None:
            found.append(("bias", self.projection.bias, 0))
        return found

    def _set(self, tensors: dict[str, Tensor], rows: int) -> None:
        for name, tensor in tensors.items():
            getattr(self.projection, name).data = tensor
        setattr(self.projection, "nf" if is_transposed(self.projection) else "out_features", rows)


class _Spread:
    """Forward hook that copies each computed head to the places that stand for it."""

    def __init__(self, places: Tensor, head_dim: int):
        self.places = places
        self.head_dim = head_dim

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """``[..., computed * D]`` to ``[..., places * D]``."""
        if self.places.device != out.device:  # the model has been moved
            self.places = self.places.to(out.device)
        heads = out.unflatten(-1, (-1, self.head_dim))
        spread: Tensor = heads.index_select(-2, self.places).flatten(-2)
        return spread


def _find(
    model: PreTrainedModel, modules: Mapping[int, nn.Module], plans: Sequence[LayerPlan]
) -> list[list[Cut]]:
    """The cuts of every layer that has some; nothing is changed."""
    seen: set[int] = set()
    shared = {
        id(parameter)
        for _, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in seen or seen.add(id(parameter))  # type: ignore[func-returns-value]
    }
    head_dim = describe(model).head_dim
    work: list[list[Cut]] = []
    whole: dict[str, list[str]] = {}  # layers by reason
    for layer, module in modules.items():
        try:
            cuts = find_cuts(module, plans[layer], head_dim, shared)
        except WholeProjectionsError as reason:
            whole.setdefault(str(reason), []).append(str(layer))
            continue
        if cuts:
            work.append(cuts)
    for text, layers in whole.items():
        logger.info(
            "Q and K of removed heads are computed in layers %s: %s", ", ".join(layers), text
        )
    return work


def _pick(heads: Tensor, wanted: tuple[int, ...], axis: int) -> Tensor:
    """Choose heads along ``axis``."""
    return heads.index_select(axis, torch.tensor(wanted, dtype=torch.long, device=heads.device))
