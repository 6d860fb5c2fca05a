"""The shape of a model's attention, from the model or its config; which models are refused."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from chai_attention.errors import UnsupportedModelError
from chai_attention.profile import ModelShape as ModelShape

# model types whose every release is tested against the definition
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "opt", "gpt2", "gpt_neox", "olmo2",
    "stablelm", "gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "olmo", "olmo3", "granite",
    "starcoder2",
)  # fmt: skip

# what the code of a model calls transformers' attention interface
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_FULL, _SLIDING = "full_attention", "sliding_attention"


def describe(model: PreTrainedModel | PreTrainedConfig) -> ModelShape:
    """Read the shape of a model's attention, or of a config alone.

    Raises:
        UnsupportedModelError: not a decoder-only model, layers of another kind than full or
            sliding-window attention, attention with compressed K (MLA), or attention that does
            not go through transformers' attention interface.
    """
    if not isinstance(model, PreTrainedConfig):
        model = unwrapped(model)
    config = model.config if isinstance(model, PreTrainedModel) else model
    _require_interface(model)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{config.model_type} has an encoder and a decoder; {supported()}"
        )
    config = config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{config.model_type} has latent attention (MLA), whose cache holds no K of single "
            f"heads that could be dropped; {supported()}"
        )
    try:
        return _shape(config)
    except RuntimeError as error:  # transformers' answer for sizes that differ by layer
        raise UnsupportedModelError(
            f"the layers of {config.model_type} have different shapes; {supported()}"
        ) from error


def decoder_config(model: Any) -> PreTrainedConfig:
    """Return the config of a model's decoder, from the model or from its config."""
    config = model if isinstance(model, PreTrainedConfig) else unwrapped(model).config
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return text


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model itself, out of an adapter library's wrapper (PEFT).

    Raises:
        UnsupportedModelError: a wrapper that does not run the model as it is, or no model.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if callable(inside := getattr(model, "get_base_model", None)):
        return unwrapped(inside())
    kind = type(model).__name__
    for name, what in (("_orig_mod", "torch.compile"), ("module", "a parallel wrapper")):
        if isinstance(getattr(model, name, None), nn.Module):
            raise UnsupportedModelError(
                f"this is a {kind}, made by {what}, which clustered heads do not run in: pass the "
                f"model inside (model.{name}), and call that one"
            )
    raise UnsupportedModelError(
        f"clustered heads need a transformers model (PreTrainedModel), not a {kind}"
    )


def _shape(config: PreTrainedConfig) -> ModelShape:
    """Read the shape off a decoder's config."""
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):  # one K/V head for all, as gpt_bigcode calls it
        kv_heads = 1
    if not (isinstance(heads, int) and isinstance(layers, int) and isinstance(kv_heads, int)):
        raise UnsupportedModelError(
            f"{config.model_type} does not say how many layers and heads it has; {supported()}"
        )
    clusterable = tuple(kind == _FULL for kind in _layer_types(config, layers))
    return ModelShape(
        architecture=config.model_type,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        clusterable=clusterable,
        hidden_size=getattr(config, "hidden_size", None),
        sliding_window=None if all(clusterable) else getattr(config, "sliding_window", None),
    )


def _layer_types(config: PreTrainedConfig, layers: int) -> list[str]:
    """Kind of every layer; raises for kinds that are neither full nor sliding attention."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        slides = window is not None and getattr(config, "use_sliding_window", True)
        kinds = [_SLIDING if slides else _FULL] * layers
    strange = sorted(set(kinds) - {_FULL, _SLIDING})
    if strange:
        raise UnsupportedModelError(
            f"{config.model_type} has layers of kind {', '.join(strange)}; {supported()}"
        )
    return list(kinds)


def _require_interface(model: PreTrainedModel | PreTrainedConfig) -> None:
    """Refuse a model whose code never asks transformers which attention to run.

    In a multimodal model it is the code of the language model inside that asks.
    """
    kinds: list[Any]
    name = model.config.model_type if isinstance(model, PreTrainedModel) else model.model_type
    if isinstance(model, PreTrainedModel):
        kinds = [type(module) for module in model.modules() if isinstance(module, PreTrainedModel)]
    else:
        text = model.get_text_config(decoder=True)
        whole = [
            _class_of(model, AutoModelForCausalLM),
            _class_of(model, AutoModelForImageTextToText),
        ]
        if whole == [None, None]:
            raise UnsupportedModelError(f"{name} is no causal language model; {supported()}")
        kinds = [*whole, _class_of(text, AutoModel)]
    codes = [sys.modules.get(kind.__module__) for kind in kinds if kind is not None]
    if not any(hasattr(code, INTERFACE) for code in codes):
        raise UnsupportedModelError(
            f"the attention of {name} does not go through transformers' attention interface; "
            f"{supported()}"
        )


def _class_of(config: PreTrainedConfig, auto: Any) -> Any:
    """The class that an Auto class makes from a config, or None."""
    return auto._model_mapping.get(type(config), None)


def supported() -> str:
    """List what is supported, for error messages."""
    return f"supported: decoder-only models such as {', '.join(FAMILIES)}"
