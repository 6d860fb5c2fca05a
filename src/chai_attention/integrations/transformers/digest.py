"""Digests that tell the weights of one model from those of another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from transformers import PreTrainedConfig, PreTrainedModel

from chai_attention.errors import LoadError
from chai_attention.integrations.transformers.devices import held_weight
from chai_attention.results import digest

_WEIGHTS = ("*.safetensors", "*.bin")  # of the first kind that there is any of
_MOST_HEADER = 2**27  # bytes of a safetensors header, as the library has it


def weights_digest(model: PreTrainedModel, samples: int = 256) -> str:
    """Return a short digest of a model's config and of evenly spaced entries of its weights."""
    parts: list[object] = [_config_text(model.config)]
    for name, weight in model.named_parameters():
        held = held_weight(model, name) if weight.is_meta else weight
        flat = held.detach().flatten()
        taken = flat[:: max(1, len(flat) // samples)].float().cpu().numpy().tobytes()
        parts += [f"{name} {tuple(weight.shape)}", taken]
    return digest(*parts)


def files_digest(name: str, config: PreTrainedConfig, samples: int = 32) -> str:
    """Return a digest of a checkpoint that is not loaded, another one than `weights_digest`.

    Args:
        name: its folder, or its name on the hub, whose revision says what its weights are.
        config: of the model.
        samples: places of every tensor that are read.

    Raises:
        LoadError: the folder holds no weights, or they cannot be read.
    """
    parts = [_config_text(config)]
    if not os.path.isdir(name):
        return digest(*parts, str(getattr(config, "_commit_hash", None)))
    folder = Path(name)
    files = next((found for each in _WEIGHTS if (found := sorted(folder.glob(each)))), [])
    if not files:
        raise LoadError(f"cannot load {name}: it holds no weights ({' or '.join(_WEIGHTS)})")
    read: list[bytes] = []
    for path in files:
        try:
            with path.open("rb") as file:
                parts.append(f"{path.name} {os.fstat(file.fileno()).st_size}")
                for start, end in _tensors(file):
                    for place in range(start, end, max(8, (end - start) // samples)):
                        file.seek(place)
                        read.append(file.read(min(8, end - place)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(f"cannot read the weights in {path}: {error}") from error
    return digest(*parts, b"".join(read))


def _config_text(config: PreTrainedConfig) -> str:
    items = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return repr(sorted(items.items(), key=lambda kv: kv[0]))


def _tensors(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Where the tensors of a file lie; of another format than safetensors, all of it is one."""
    whole = os.fstat(file.fileno()).st_size
    if not file.name.endswith(".safetensors"):
        yield 0, whole
        return
    size = int.from_bytes(file.read(8), "little")
    if size > min(_MOST_HEADER, whole):
        raise ValueError("this is no safetensors file")
    header = file.read(size)
    yield 8, 8 + size
    for name, tensor in json.loads(header).items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            yield 8 + size + start, 8 + size + end
