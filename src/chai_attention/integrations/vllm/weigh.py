"""From a model's config and vLLM's options to an estimate; no weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from chai_attention.integrations.vllm.command_line import OptionError, Options
from chai_attention.integrations.vllm.estimate import Estimate, batch_defaults, estimate
from chai_attention.integrations.vllm.options import EIGHT_BITS, cache_problem, named_profile
from chai_attention.runtime.shape import describe
from chai_attention.runtime.skeleton import empty_model

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
    text, given = config.get_text_config(decoder=True), Options(options)
    size = element_size(text, given)
    longest = _longest(given, text.max_position_embeddings)
    cache = given.text("--kv-cache-dtype") or "auto"
    if (problem := cache_problem(cache, None)) is not None:
        raise OptionError(f"clustered heads do not support {problem}")
    requests, batch_tokens = _batch(given, gpu_bytes, longest)
    return estimate(
        describe(config),
        named_profile(profile),
        gpu_bytes=gpu_bytes,
        weight_bytes=parameters(config) * size,
        vocabulary=text.vocab_size,
        utilization=_utilization(given),
        requests=requests,
        batch_tokens=batch_tokens,
        longest=longest,
        element_size=size,
        cache_element_size=1 if cache in EIGHT_BITS else size,
        block=given.count("--block-size", 0) or None,
        ranks=given.count("--tensor-parallel-size", 1),
    )


def element_size(config: PreTrainedConfig, options: Options) -> int:
    """Bytes of a number of the model's weights and hidden states as vLLM runs it."""
    saved = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    named = options.text("--dtype") or "auto"
    # vLLM runs checkpoints in float32 as float16 unless it is told otherwise
    if named not in ("auto", *_SIZES):
        raise OptionError(f"--dtype is one of auto, {', '.join(_SIZES)}, not {named!r}")
    dtype = saved if named == "auto" and saved != "float32" else named
    return _SIZES.get(dtype, 2)


def parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model, counted without any memory for them."""
    model = empty_model(config, torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())


def _batch(options: Options, gpu_bytes: int, longest: int) -> tuple[int, int]:
    """Requests and tokens of a step, where they are not given as vLLM chooses them."""
    requests, tokens = batch_defaults(gpu_bytes)
    if options.text("--performance-mode") == "throughput":
        requests, tokens = 2 * requests, 2 * tokens
    given = options.count("--max-num-seqs", 0)
    tokens = min(tokens, (given or requests) * longest)
    tokens = options.count("--max-num-batched-tokens", tokens)
    return given or min(requests, tokens), tokens


def _utilization(options: Options) -> float:
    """The share of a GPU's memory that vLLM may take."""
    name = "--gpu-memory-utilization"
    share = options.number(name, 0.92)
    if not 0 < share <= 1:
        raise OptionError(f"{name} is a share of more than 0 and at most 1, not {share:g}")
    return share


def _longest(options: Options, default: int) -> int:
    """Tokens of the longest request; "auto" and -1 leave it to vLLM."""
    name = "--max-model-len"
    left = options.text(name) in ("auto", "-1")
    return default if left else options.count(name, default)
