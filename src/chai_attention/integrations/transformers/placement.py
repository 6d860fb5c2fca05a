"""Which device each part of a model goes to: accelerate's device maps, read and checked."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from chai_attention.errors import LoadError
from chai_attention.integrations.transformers.room import available, gigabytes, tensor_bytes
from chai_attention.strict_json import load_json

WORDS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
CPU, DISK = "cpu", "disk"
Place = int | str  # number of a GPU, or "cpu"
EXTRA = "pip install 'chai-attention[large]'"
_SIZE = re.compile(
    r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<prefix>[KMGT])(?P<binary>I?)B", re.IGNORECASE
)


@dataclass(frozen=True)
class Placement:
    """How to divide a model among devices.

    Attributes:
        device_map: one of `WORDS`, or the place of every part by its name ("" for the whole).
        max_memory: bytes that weights may take on each place; None for what GPUs have free, less
            the room that the work on them needs.
    """

    device_map: str | Mapping[str, Place]
    max_memory: Mapping[Place, int] | None = None

    def divide(self, model: PreTrainedModel, room: int = 0) -> dict[str, Place]:
        """Say where each part of a model goes; nothing is loaded or moved.

        Args:
            model: on the meta device, in the dtype that it will have.
            room: bytes that the work needs beside the weights, on any of the devices.

        Returns:
            The place of every part, by its name: what ``from_pretrained`` and accelerate's
            ``dispatch_model`` take.

        Raises:
            LoadError: it does not fit, or names of parts or places that there are not.
        """
        if not isinstance(self.device_map, str):
            return _checked(dict(self.device_map), model)
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        given = self.max_memory
        memory = dict(_free_for_weights(room) if given is None else given)
        too_large = _too_large(model, memory, room, given is None)
        if tensor_bytes(model) > sum(memory.values()):
            raise LoadError(too_large)
        blocks = list(model._no_split_modules or [])
        model.tie_weights()
        with warnings.catch_warnings(action="ignore"):  # of what is refused here
            if self.device_map != "sequential":
                low_zero = self.device_map == "balanced_low_0"
                memory = get_balanced_memory(
                    model, memory, no_split_module_classes=blocks, low_zero=low_zero
                )
            found: dict[str, Place] = infer_auto_device_map(
                model, memory, no_split_module_classes=blocks
            )
        if DISK in found.values():
            raise LoadError(too_large)
        return found


def parse_placement(device_map: str | None, max_memory: str | None) -> Placement | None:
    """Read the options ``--device-map`` and ``--max-memory``.

    Args:
        device_map: a word, or a JSON file of names of modules and places: GPUs by number ("0" and
            "cuda:0" are numbers, too) and "cpu".
        max_memory: such as ``0=70GiB,1=70GiB,cpu=100GiB``.

    Returns:
        None without a device map.

    Raises:
        LoadError: what is wrong with them.
    """
    if device_map is None:
        if max_memory is not None:
            raise LoadError(
                "--max-memory says how --device-map may divide the model: give --device-map auto"
            )
        return None
    if importlib.util.find_spec("accelerate") is None:
        raise LoadError(f"--device-map needs the package accelerate: {EXTRA}")
    if device_map in WORDS:
        return Placement(device_map, None if max_memory is None else _memory(max_memory))
    if max_memory is not None:
        raise LoadError(
            "--max-memory is for --device-map auto or balanced: a file says itself where each "
            "part goes"
        )
    return Placement(_read_map(device_map))


def random_weights(model: PreTrainedModel, places: Mapping[str, Place]) -> PreTrainedModel:
    """Give a model on the meta device random weights where `Placement.divide` wants them.

    They are made on the devices, so that the host never holds them.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    modules = dict(model.named_modules())
    for name, place in places.items():
        if name in modules:
            modules[name].to_empty(device=_device(place))
        else:  # a parameter or buffer of its own
            owner, _, own = name.rpartition(".")
            _fill(modules[owner], own, _device(place))
    model.init_weights()
    if len(set(places.values())) > 1:
        from accelerate import dispatch_model

        dispatch_model(model, dict(places), skip_keys=model._skip_keys_device_placement)
        drop_inner_hooks(model)
    return model


def drop_inner_hooks(model: nn.Module) -> None:
    """Take accelerate's hooks off modules that stand inside one whose hook does the same.

    Besides the parts of a device map it hooks every module in them. That takes more time in Python
    than a decode step of a layer, and moves nothing: the part's own hook has done so.
    """
    if not hasattr(model, "_hf_hook"):
        return
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_module

    def walk(module: nn.Module, above: Any) -> None:
        hook: Any = getattr(module, "_hf_hook", None)
        plain = isinstance(hook, AlignDevicesHook) and not hook.offload and not hook.io_same_device
        if plain and above is not None and hook.execution_device == above:
            remove_hook_from_module(module)
            vars(module).pop("forward", None)  # what it leaves: the class's own
        elif plain:
            above = hook.execution_device
        elif hook is not None:
            above = None
        for child in module.children():
            walk(child, above)

    walk(model, None)


def _read_map(file: str) -> dict[str, Place]:
    """A device map from a JSON file."""
    try:
        data = load_json(Path(file))
    except OSError as error:
        raise LoadError(
            f"--device-map is {', '.join(WORDS[:2])} or a JSON file of modules and devices: "
            f"{file}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise LoadError(f"--device-map {file} is no device map: {error}") from error
    if not isinstance(data, dict) or not data:
        raise LoadError(
            f'--device-map {file} is no device map: {{"model.layers.0": 0, ...}}, the device of '
            "every module by its name"
        )
    return {name: _place(value, f"--device-map {file}: {name!r}") for name, value in data.items()}


def _memory(text: str) -> dict[Place, int]:
    """``0=70GiB,cpu=100GiB`` in bytes."""
    found: dict[Place, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        where = f"--max-memory {text}"
        if not equals:
            raise LoadError(f"{where}: write GPU=SIZE or cpu=SIZE, such as 0=70GiB,cpu=100GiB")
        place = _place(name, where)
        if place in found:
            raise LoadError(f"{where}: {name} is there twice")
        if (match := _SIZE.fullmatch(size)) is None:
            raise LoadError(f"{where}: {size!r} is no size: write 70GiB, 70GB, 500MiB or 500MB")
        step = 1024 if match["binary"] else 1000
        power = "KMGT".index(match["prefix"].upper()) + 1
        found[place] = int(float(match["number"]) * step**power)
    return found


def _place(value: Any, where: str) -> Place:
    """A GPU's number, or "cpu".

    Raises:
        LoadError: another device, or one that is not here.
    """
    if value == DISK:
        raise LoadError(
            f"{where}: weights on disk would be read again for every forward: keep them in the "
            "host's memory (cpu)"
        )
    if value == CPU:
        return CPU
    text = str(value).removeprefix("cuda:")
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()):
        raise LoadError(f"{where}: {value!r} is no device: a GPU's number (0, 1, ...), or cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(text) >= count:
        there = f"GPUs are 0 to {count - 1}" if count else "there is no GPU"
        raise LoadError(f"{where}: no GPU {text} here: {there}")
    return int(text)


def _checked(places: dict[str, Place], model: PreTrainedModel) -> dict[str, Place]:
    """The device map of a file, if it fits the model."""
    modules = dict(model.named_modules())
    tensors = {
        name: tensor
        for kind in (model.named_parameters, model.named_buffers)
        for name, tensor in kind(remove_duplicate=False)
    }
    for name in places:
        if name not in modules and name not in tensors:
            names = ", ".join(name for name, _ in model.named_children())
            raise LoadError(
                f"the device map names {name!r}, which this model does not have: its parts are "
                f"{names}, and what is inside them"
            )
    of = {name: _place_of(name, places) for name in tensors}
    left = [name for name, place in of.items() if place is None]
    if left:
        raise LoadError(f"the device map says nothing about {left[0]}, and {len(left) - 1} others")
    for name, module in modules.items():
        if type(module).__name__ in (model._no_split_modules or ()):
            inside = {place for each, place in of.items() if each.startswith(f"{name}.")}
            if len(inside) > 1:
                raise LoadError(
                    f"the device map divides {name}, which has to be on one device as a whole"
                )
    for place in set(places.values()):
        held = {id(t): t for name, t in tensors.items() if of[name] == place}
        wanted, free = sum(t.nbytes for t in held.values()), available(_device(place))
        if free is not None and wanted > free:
            raise LoadError(
                f"the device map puts {gigabytes(wanted)} on {_device(place)}, which has "
                f"{gigabytes(free)} free"
            )
    return places


def _place_of(name: str, places: Mapping[str, Place]) -> Place | None:
    """Where a tensor goes: the place of the innermost part that the map names."""
    while True:
        if name in places:
            return places[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def _free_for_weights(room: int) -> dict[Place, int]:
    """Bytes of every GPU, or of the host where there is none, beside the work's room."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    places: list[Place] = [*range(count)] or [CPU]
    return {place: max(0, (available(_device(place)) or 2**62) - room) for place in places}


def _too_large(
    model: PreTrainedModel, memory: Mapping[Place, int], room: int, measured: bool
) -> str:
    """One line about a model that the places cannot hold."""
    whole, total = tensor_bytes(model), sum(memory.values())
    if not measured:
        return (
            f"the model's {gigabytes(whole)} of weights do not fit --max-memory, which sums up to "
            f"{gigabytes(total)}: a layer is never divided; give more, or add cpu=SIZE"
        )
    if all(place == CPU for place in memory):
        return (
            f"the model's {gigabytes(whole)} of weights do not fit: there is no GPU here, and the "
            f"host has {gigabytes(total)} for them beside {gigabytes(room)} for the work: take a "
            "machine with more memory, or --dtype bfloat16"
        )
    return (
        f"the model's {gigabytes(whole)} of weights do not fit: the GPUs have {gigabytes(total)} "
        f"for them, {gigabytes(room)} each kept for the work. With --max-memory that names cpu, "
        "such as 0=70GiB,cpu=200GiB, the rest waits in the host's memory, which is slow"
    )


def _device(place: Place) -> torch.device:
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _fill(module: nn.Module, name: str, device: torch.device) -> None:
    """Put a parameter or buffer without contents on a device."""
    tensor = getattr(module, name)
    empty = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    setattr(module, name, empty)
