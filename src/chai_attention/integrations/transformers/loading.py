"""Loading models for the command line, with errors a person can act on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from chai_attention.errors import ChaiError, LoadError, first_line
from chai_attention.hub import SMOLLM2, find_model, is_gguf
from chai_attention.integrations.transformers.placement import (
    EXTRA,
    Place,
    Placement,
    drop_inner_hooks,
)
from chai_attention.integrations.transformers.room import (
    Work,
    WorkOf,
    available,
    gigabytes,
    is_surely_small,
    tensor_bytes,
)
from chai_attention.runtime.skeleton import empty_model, load_config, load_error, smollm2_file

_LITTLE = 2 * 10**9  # bytes that any work with a small model needs at most
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    *,
    trust_remote_code: bool = False,
    placement: Placement | None = None,
    work: WorkOf | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer; a model that does not fit is refused first.

    Args:
        name: a folder, a name on the hub, a ``.gguf`` file, or "smollm2-135m" for the model that
            the extra ``demo`` installs.
        dtype: float32, bfloat16, float16, or auto: bfloat16 on a GPU, else float32.
        device: cpu, cuda, or auto.
        trust_remote_code: run Python code that the model comes with.
        placement: divide the model among devices, in place of ``device``.
        work: what is to be done with it, by its config; None for a few forwards.

    Raises:
        LoadError: no such model, one that needs code of its own or does not fit, or an impossible
            dtype or device.
    """
    if placement is not None and device != "auto":
        raise LoadError("--device-map says where the model goes: leave out --device")
    device = resolve_device(device)
    chosen = resolve_dtype(dtype, device)
    options = {"local_files_only": find_model(name), "trust_remote_code": trust_remote_code}
    transformers_logging.disable_progress_bar()
    places = _places(name, chosen, torch.device(device), trust_remote_code, placement, work)
    try:
        if is_gguf(name):
            path = smollm2_file() if name == SMOLLM2 else Path(name)
            return _load_gguf(path, chosen, device)
        model: Any
        if places is not None:
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=chosen, device_map=places, **options
            )
            drop_inner_hooks(model)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen, **options).to(device)
        return model.eval(), AutoTokenizer.from_pretrained(name, **options)
    except ChaiError:
        raise
    except Exception as error:  # loading fails in a different way for every kind of mistake
        raise load_error(name, error) from error


def _places(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    placement: Placement | None,
    work: WorkOf | None,
) -> dict[str, Place] | None:
    """Where each part of a model goes; None for all of it to the device.

    Raises:
        LoadError: it does not fit.
    """
    gguf = is_gguf(name)
    if placement is not None and gguf:
        raise LoadError("--device-map is for checkpoints in folders, not for .gguf files")
    free = available(device)
    small = free is None or name == SMOLLM2 or is_surely_small(name, _LITTLE, free)
    if placement is None and small:
        return None
    config = load_config(name, trust_remote_code=trust_remote_code)
    if placement is None and hasattr(config, "quantization_config") and not gguf:
        return None  # how large it will be is known to its quantiser only
    room = (work or (lambda config: Work()))(config).bytes(config, dtype)
    try:
        model = empty_model(config, dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a config without a causal language model
        raise load_error(name, error) from error
    if placement is not None:
        return placement.divide(model, room)
    weights = tensor_bytes(model)
    if free is None or weights + room <= free:
        return None
    divided = "several GPUs" if device.type == "cuda" else "GPUs and the host's memory"
    advice = f"--device-map auto divides it among {divided} ({EXTRA})"
    if gguf:
        advice = "a .gguf file is never divided: take more memory, or --dtype bfloat16"
    raise LoadError(
        f"{name} needs about {gigabytes(weights + room)} on {device} ({gigabytes(weights)} of "
        f"weights in {str(dtype).removeprefix('torch.')}, {gigabytes(room)} for the work), and "
        f"{gigabytes(free)} are free: {advice}"
    )


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the dtype that a name or "auto" means on a device.

    Raises:
        LoadError: an unknown name.
    """
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in DTYPES:
        raise LoadError(f"dtype is one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]


def resolve_device(device: str) -> str:
    """Return the device that a name or "auto" means.

    Raises:
        LoadError: one that is not there, or has no memory for results ("meta").
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # every kind of device is missing in its own way
        reason = first_line(error)[:200]  # torch lists all that it knows
        raise LoadError(f"--device {device} cannot be used here: {reason}") from error
    return device


def saved_dtype(name: str, *, trust_remote_code: bool = False) -> str:
    """Name of the dtype a model was saved in; "auto" where its config does not say, or another."""
    if is_gguf(name):
        return "auto"  # quantised files have no such dtype
    saved = str(
        getattr(load_config(name, trust_remote_code=trust_remote_code), "dtype", None)
    ).removeprefix("torch.")
    return saved if saved in DTYPES else "auto"


def _load_gguf(
    path: Path, dtype: torch.dtype, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as a plain model that can be saved and moved like any other."""
    if importlib.util.find_spec("gguf") is None:
        raise LoadError(
            "reading .gguf files needs the package gguf: pip install 'chai-attention[demo]'"
        )
    if not path.is_file():
        raise LoadError(f"no such file: {path}")
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # the loaded object counts as quantised and refuses save_pretrained; its weights are plain
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.to(device).eval(), tokenizer
