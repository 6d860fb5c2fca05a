"""What vLLM was asked for, against what clustered heads can do."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.profile import EXPORTED, ONLINE, ClusterProfile

# drafts that come without a model of their own, whose layers would need pages too
DRAFT_METHODS = ("ngram", "ngram_gpu", "suffix")
_DIGEST = "sha256"
PAGE_MULTIPLE = 16  # tokens; what the kernels need of a page
EIGHT_BITS = ("fp8", "fp8_e4m3")  # names of K,V caches of float8_e4m3fn
CACHE_DTYPES = {"float16": "torch.float16", "bfloat16": "torch.bfloat16"}


def profile_of(config: Any) -> ClusterProfile:
    """The profile that ``--additional-config`` names, or the one beside an exported model.

    Args:
        config: a ``VllmConfig``.

    Raises:
        ProfileError: none is named, or it cannot be read.
    """
    options = (config.additional_config or {}).get("chai", {})
    if not isinstance(options, Mapping) or set(options) - {"profile", _DIGEST}:
        raise ProfileError(
            f"additional_config's 'chai' holds nothing but a profile, not {options!r}: "
            '{"chai": {"profile": "FILE"}}'
        )
    if "profile" in options:
        return ClusterProfile.resolve(str(options["profile"]))
    model = Path(config.model_config.model)
    if not (model / EXPORTED).is_file():
        raise ProfileError(
            "clustered heads need a profile: --additional-config "
            f'\'{{"chai": {{"profile": "FILE"}}}}\', or a model folder with {EXPORTED} in it'
        )
    return ClusterProfile.resolve(model)


def mark(config: Any, profile: ClusterProfile) -> None:
    """Put the profile's contents into what vLLM knows compiled models by.

    Which layers run our attention is compiled into the model; the path of the profile does not
    tell what is in it.
    """
    digest = hashlib.sha256(profile.to_json().encode()).hexdigest()
    given = dict(config.additional_config or {})
    config.additional_config = {**given, "chai": {**given.get("chai", {}), _DIGEST: digest}}


def refuse(config: Any, profile: ClusterProfile) -> None:
    """Stop at options that would give wrong results.

    Raises:
        UnsupportedModelError: names the option and what to do.
    """
    parallel, cache = config.parallel_config, config.cache_config
    dtype = cache.cache_dtype
    speculative = config.speculative_config
    reasons = {
        f"a K,V cache of {dtype}: use --kv-cache-dtype auto or fp8": dtype
        not in ("auto", *EIGHT_BITS)
        and CACHE_DTYPES.get(dtype) != str(config.model_config.dtype),
        "a K,V cache of 8 bits in some layers only: leave out --kv-cache-dtype-skip-layers": bool(
            getattr(cache, "kv_cache_dtype_skip_layers", None)
        ),
        "context parallelism: leave out --decode-context-parallel-size and "
        "--prefill-context-parallel-size": parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "K,V connectors, as memberships do not travel with the pages: leave out "
        "--kv-transfer-config": config.kv_transfer_config is not None,
        "drafts of a model: use --speculative-config with one of the methods "
        f"{', '.join(DRAFT_METHODS)}": speculative is not None
        and speculative.method not in DRAFT_METHODS,
        "prefix caching with an exact recent window, as pages hold no K of removed heads: add "
        "--no-enable-prefix-caching, or use a profile without a window (chai calibrate "
        "--recent 0)": bool(profile.recent and cache.enable_prefix_caching),
        "microbatches (--enable-dbo) with an exact recent window or online memberships": bool(
            getattr(parallel, "enable_dbo", False)
        )
        and bool(profile.recent or profile.membership == ONLINE),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(f"clustered heads do not support {reason}")
    if profile.refit is not None:
        raise ProfileError(
            "this profile has a refit of the model's weights, which vLLM loads as a checkpoint: "
            "chai export MODEL --profile FILE --out FOLDER, and serve that folder"
        )


def page_problem(probe_end: int, page: int) -> str | None:
    """Why a prefix of pages cannot be found by its tokens alone; None if it can.

    Args:
        probe_end: tokens of a prompt that decide its membership, from its first one on.
        page: tokens of a page.
    """
    if probe_end <= page:
        return None
    enough = -(-probe_end // PAGE_MULTIPLE) * PAGE_MULTIPLE
    return (
        f"prefix caching with pages of {page} tokens and memberships that are decided on a "
        f"prompt's first {probe_end}, which must stand in one page: add --block-size {enough} or "
        "more, or --no-enable-prefix-caching"
    )


def refuse_layer(
    name: str,
    *,
    alibi: bool,
    sliding_window: bool,
    decoder: bool,
    shared: bool,
    extras: Mapping[str, object],
) -> None:
    """Stop at a layer whose attention is not plain causal attention.

    Raises:
        UnsupportedModelError: says what it is.
    """
    found = [
        *(["ALiBi"] if alibi else []),
        *(["a sliding window"] if sliding_window else []),
        *([] if decoder else ["attention that is not a decoder's"]),
        *(["a K,V cache shared with another layer"] if shared else []),
        *(key for key, value in extras.items() if value is not None),
    ]
    if found:
        raise UnsupportedModelError(
            f"clustered heads in vLLM need plain causal attention; {name} has {', '.join(found)}"
        )
