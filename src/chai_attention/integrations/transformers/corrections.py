"""Refit output weights: put into a model and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.transformers.modules import (
    PLAIN,
    is_transposed,
    output_projection,
    output_weight,
)


class Corrections:
    """Replaces output weights and adds to output biases while it is in force.

    The parameters that were there are kept, not computed back: `undo` restores them bit for bit,
    on the device and in the dtype that the model has by then.

    Args:
        modules: attention module of every layer.
        tensors: ``layers.N.weight [out, in]``, which replaces W_O, and ``layers.N.bias [out]``,
            which is added to the bias.

    Raises:
        ProfileError: a tensor that does not fit the model.
        UnsupportedModelError: an output projection that is wrapped, such as by an adapter.
    """

    def __init__(self, modules: Mapping[int, nn.Module], tensors: Mapping[str, Tensor]):
        self._before: list[tuple[Any, str, nn.Parameter | None]] = []
        work = [_place(modules, name, tensor) for name, tensor in tensors.items()]
        try:
            for projection, name, tensor in work:
                self._replace(projection, name, tensor)
        except BaseException:  # such as no memory for a layer in the middle
            self.undo()
            raise

    @staticmethod
    def check(modules: Mapping[int, nn.Module], tensors: Mapping[str, Tensor]) -> None:
        """Raise what the constructor would, and change nothing."""
        for name, tensor in tensors.items():
            _place(modules, name, tensor)

    def _replace(self, projection: Any, name: str, tensor: Tensor) -> None:
        before: nn.Parameter | None = getattr(projection, name, None)
        tensor = tensor.to(projection.weight)
        if name == "weight":
            tensor = (tensor.T if is_transposed(projection) else tensor).contiguous()
        elif before is not None:
            tensor = tensor + before.detach()
        self._before.append((projection, name, before))
        setattr(projection, name, nn.Parameter(tensor, requires_grad=False))

    @property
    def changed(self) -> list[nn.Module]:
        """The projections whose weight or bias is the refit's."""
        return list({id(projection): projection for projection, _, _ in self._before}.values())

    def undo(self) -> None:
        """Put back what was there."""
        for projection, name, before in reversed(self._before):
            now = getattr(projection, name)
            if before is not None:  # the model may have been moved, cast or quantised meanwhile
                dtype = now.dtype if now.dtype in PLAIN else before.dtype
                before.data = before.data.to(now.device, dtype)
            setattr(projection, name, before)
        self._before = []


def _place(
    modules: Mapping[int, nn.Module], name: str, tensor: Tensor
) -> tuple[nn.Module, str, Tensor]:
    """The projection and parameter that a tensor belongs to, checked."""
    parts = name.split(".")
    known = len(parts) == 3 and parts[0] == "layers" and parts[2] in ("weight", "bias")
    layer = int(parts[1]) if known and parts[1].isdigit() else -1
    reason = f"the refit holds {name}, which this model does not have"
    if layer in modules:
        weight = output_weight(modules[layer])
        wanted = weight.shape if parts[2] == "weight" else weight.shape[:1]
        if tensor.shape == wanted:
            return plain_projection(layer, modules[layer]), parts[2], tensor
        reason = f"{name} of the refit is {list(tensor.shape)}, this model needs {list(wanted)}"
    raise ProfileError(
        f"{reason}: it was made for another one. Calibrate this model with --refit, or use a "
        "profile without"
    )


def plain_projection(layer: int, module: nn.Module) -> nn.Module:
    """Return the output projection of a layer, whose weight a refit can replace.

    Raises:
        UnsupportedModelError: its weight is not its own, or quantised.
    """
    projection = output_projection(module)
    if "weight" not in projection._parameters:
        raise UnsupportedModelError(
            f"the output projection of layer {layer} is a {type(projection).__name__}, not one "
            "whose weights a refit can replace: merge the adapter into the model "
            "(merge_and_unload()), or use a profile without a refit"
        )
    return projection
