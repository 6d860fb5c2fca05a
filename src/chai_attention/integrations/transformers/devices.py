"""Where the parts of a model are: models on several devices, as accelerate's device maps make them.

accelerate moves what a layer is called with to the layer's device, before every forward of it.
What we keep is made where a layer's tensors are, and kernels have to be launched there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.modes import eager

PADDING_TAG = "_chai_padding"
_MOVED = "_chai_moved"


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices that hold a model's weights, in their order; offloaded weights are on none."""
    found = dict.fromkeys(parameter.device for parameter in model.parameters())
    return [device for device in found if device.type != "meta"]


def on_several_devices(model: nn.Module) -> bool:
    """Whether a model's weights are on more than one device."""
    return len(devices_of(model)) > 1


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens: where its first weights are, or are brought to."""
    hook = getattr(model, "_hf_hook", None)  # of accelerate
    device = getattr(hook, "execution_device", None)
    if device is None:
        return next((d for d in devices_of(model)), torch.device("cpu"))
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def has_offloaded_weights(model: nn.Module) -> bool:
    """Whether weights wait elsewhere (accelerate's offloading) until their layer runs."""
    return any(parameter.is_meta for parameter in model.parameters())


def held_weight(model: nn.Module, name: str) -> Tensor:
    """A weight by its name, also one that is offloaded.

    Raises:
        UnsupportedModelError: it is nowhere in reach.
    """
    weight = model.get_parameter(name)
    if not weight.is_meta:
        return weight
    owner, _, own = name.rpartition(".")
    kept = getattr(getattr(model.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    if kept is None:
        raise UnsupportedModelError(f"{name} has no contents: load the model before it is used")
    found: Tensor = kept[own]
    return found


def launched_on(states: Tensor) -> AbstractContextManager[object]:
    """A region whose kernels run where ``states`` are: Triton launches on the current device."""
    if not states.is_cuda or states.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(states.device)


def hook_masks(layers: list[nn.Module]) -> list[RemovableHandle]:
    """Bring a forward's padding to each device once, not to each layer anew.

    accelerate copies it for every layer that is on another device than the first, and what is
    found out about a copy is lost with it.

    Args:
        layers: the decoder's, of a model on several devices.
    """
    hooks = []
    for layer in layers:
        device = next((parameter.device for parameter in layer.parameters()), None)
        if device is not None and device.type != "meta":
            hook = _BringMask(device)
            hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    return hooks


class _BringMask:
    """Hook of a decoder layer; can be copied and pickled with it."""

    def __init__(self, device: torch.device):
        self.device = device

    @eager
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moved = tuple(self._moved(value) for value in args)
        return moved, {name: self._moved(value) for name, value in kwargs.items()}

    def _moved(self, value: Any) -> Any:
        """A mask of ours on this device, one for all layers of a forward; others as they are."""
        if not isinstance(value, Tensor) or not hasattr(value, PADDING_TAG):
            return value
        if value.device == self.device:
            return value
        known: dict[torch.device, Tensor] = vars(value).setdefault(_MOVED, {})
        if self.device not in known:
            known[self.device] = value.to(self.device)
            setattr(known[self.device], PADDING_TAG, [])
        return known[self.device]
