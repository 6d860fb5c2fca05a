"""From a model's config and vLLM's options to an estimate; no weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from chai_attention.errors import ChaiError
from chai_attention.integrations.transformers.support import describe
from chai_attention.integrations.vllm.estimate import BLOCK, Estimate, estimate
from chai_attention.integrations.vllm.options import EIGHT_BITS
from chai_attention.integrations.vllm.serving import option_value
from chai_attention.profile import ClusterProfile

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_SIZES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


def estimate_config(
    config: PreTrainedConfig, profile: str, options: Sequence[str], gpu_bytes: int
) -> Estimate:
    """Estimate capacity and gain of a model.

    Args:
        config: the model's.
        profile: as `ClusterProfile.resolve` takes it.
        options: of ``vllm serve``; those that matter for memory are heeded.
        gpu_bytes: memory of one GPU.

    Raises:
        ChaiError: an option that is no number, a profile that does not fit, too little memory.
    """
    text = config.get_text_config(decoder=True)
    saved = str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch.")
    named = option_value(options, "--dtype") or "auto"
    # vLLM runs checkpoints in float32 as float16 unless it is told otherwise
    dtype = saved if named == "auto" and saved != "float32" else named
    size = _SIZES.get(dtype, 2)
    return estimate(
        describe(config),
        ClusterProfile.resolve(profile),
        gpu_bytes=gpu_bytes,
        weight_bytes=parameters(config) * size,
        vocabulary=text.vocab_size,
        utilization=_number(options, 0.92, "--gpu-memory-utilization"),
        requests=int(_number(options, 256, "--max-num-seqs")),
        batch_tokens=_tokens(options, 8192, "--max-num-batched-tokens"),
        longest=_longest(options, text.max_position_embeddings),
        element_size=size,
        cache_element_size=1 if option_value(options, "--kv-cache-dtype") in EIGHT_BITS else size,
        block=int(_number(options, BLOCK, "--block-size")),
        ranks=int(_number(options, 1, "--tensor-parallel-size", "-tp")),
    )


def parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model, counted without any memory for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _longest(options: Sequence[str], default: int) -> int:
    """Tokens of the longest request; "auto" and -1 leave it to vLLM."""
    name = "--max-model-len"
    return (
        default
        if option_value(options, name) in ("auto", "-1")
        else _tokens(options, default, name)
    )


def _tokens(options: Sequence[str], default: int, name: str) -> int:
    """A whole number, which vLLM also takes with a suffix: 8k is 8,000, 8K is 8,192."""
    text = option_value(options, name) or ""
    if text[-1:] not in _SUFFIXES:
        return int(_number(options, default, name))
    return int(_number([name, text[:-1]], default, name) * _SUFFIXES[text[-1]])


def _number(options: Sequence[str], default: float, *names: str) -> float:
    text = option_value(options, *names)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError as error:
        raise ChaiError(f"{names[0]} is a number, not {text!r}") from error
