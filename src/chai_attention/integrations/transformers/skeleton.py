"""A model without weights: its config, its modules and its tokenizer, for engines that load it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from chai_attention.errors import LoadError
from chai_attention.hub import SMOLLM2, find_model
from chai_attention.integrations.transformers.loading import load_config
from chai_attention.integrations.transformers.room import empty_model


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
    if name == SMOLLM2 or Path(name).suffix == ".gguf":
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
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadError(f"cannot load {name}: {reason[0]}") from error
    return model, tokenizer
