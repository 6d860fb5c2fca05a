"""Refuses options of vLLM that clustered heads do not support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.vllm.command_line import Options
from chai_attention.integrations.vllm.layers import PAGE, PAGE_MULTIPLE
from chai_attention.profile import STATIC, ClusterProfile
from chai_attention.profile_files import EXPORTED, holds_export, require_refit_weights
from chai_attention.results import digest as digest_of

# drafts that come without a model of their own, whose layers would need pages too
DRAFT_METHODS = ("ngram", "ngram_gpu", "suffix")
# keys of --speculative-config that have options of their own
SPECULATIVE = {
    "method": "--spec-method",
    "model": "--spec-model",
    "num_speculative_tokens": "--spec-tokens",
}
_DIGEST = "sha256"
EIGHT_BITS = ("fp8", "fp8_e4m3")  # names of K,V caches of float8_e4m3fn
CACHE_DTYPES = ("float16", "bfloat16")  # that it may have if the model has them


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
    if not holds_export(model):
        raise ProfileError(
            "clustered heads need a profile: --additional-config "
            f'\'{{"chai": {{"profile": "FILE"}}}}\', or a model folder with {EXPORTED} in it'
        )
    return ClusterProfile.load(model / EXPORTED)


def mark(config: Any, profile: ClusterProfile) -> None:
    """Put the profile's contents into what vLLM knows compiled models by.

    Which layers run our attention is compiled into the model; the path of the profile does not
    tell what is in it.
    """
    digest = digest_of(profile.to_json(), digits=64)
    given = dict(config.additional_config or {})
    config.additional_config = {**given, "chai": {**given.get("chai", {}), _DIGEST: digest}}


def choose_page(cache: Any, on_gpu: bool) -> bool:
    """Take pages of `PAGE` tokens on GPUs, where ``--block-size`` asks for none.

    vLLM lets a backend prefer a size only if it is the model's only one, which local pages and
    layers without clusters prevent. It would take 16, and local pages of 16, which are larger.

    Args:
        cache: a ``CacheConfig``.
        on_gpu: whether the model runs on a GPU.

    Returns:
        Whether they were chosen here.
    """
    if on_gpu and not getattr(cache, "user_specified_block_size", True):
        cache.block_size, cache.user_specified_block_size = PAGE, True
        return True
    return False


@dataclass(frozen=True)
class Asked:
    """Options of vLLM that clustered heads depend on.

    Attributes:
        cache_dtype: ``--kv-cache-dtype``.
        dtype: of the model; None where it is not known yet.
        skips_layers: ``--kv-cache-dtype-skip-layers`` is given.
        context_ranks: the larger one of both kinds of context parallelism.
        offloads: ``--kv-offloading-size`` is given.
        connects: ``--kv-transfer-config`` is given.
        drafts: method of ``--speculative-config``; None without one.
        caches_prefixes: whether prefix caching is on.
        microbatches: ``--enable-dbo``.
        one_kind_of_pages: ``--disable-hybrid-kv-cache-manager``.
        sleeps: ``--enable-sleep-mode``.
        page: ``--block-size``; None where vLLM chooses.
    """

    cache_dtype: str = "auto"
    dtype: str | None = None
    skips_layers: bool = False
    context_ranks: int = 1
    offloads: bool = False
    connects: bool = False
    drafts: str | None = None
    caches_prefixes: bool = True
    microbatches: bool = False
    one_kind_of_pages: bool = False
    sleeps: bool = False
    page: int | None = None

    @classmethod
    def of_config(cls, config: Any) -> Asked:
        """What a ``VllmConfig`` says."""
        parallel, cache = config.parallel_config, config.cache_config
        scheduler = getattr(config, "scheduler_config", None)
        speculative = config.speculative_config
        return cls(
            cache_dtype=cache.cache_dtype,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            skips_layers=bool(getattr(cache, "kv_cache_dtype_skip_layers", None)),
            context_ranks=max(
                parallel.decode_context_parallel_size,
                getattr(parallel, "prefill_context_parallel_size", 1),
            ),
            offloads=bool(getattr(cache, "kv_offloading_size", None)),
            connects=config.kv_transfer_config is not None,
            drafts=None if speculative is None else speculative.method,
            caches_prefixes=bool(cache.enable_prefix_caching),
            microbatches=bool(getattr(parallel, "enable_dbo", False)),
            one_kind_of_pages=bool(getattr(scheduler, "disable_hybrid_kv_cache_manager", False)),
            sleeps=bool(getattr(config.model_config, "enable_sleep_mode", False)),
            page=getattr(cache, "block_size", None),
        )

    @classmethod
    def of_options(cls, options: Options) -> Asked:
        """What the options of a server say."""
        drafts = options.mapping("--speculative-config")
        for key, name in SPECULATIVE.items():
            if (value := options.text(name)) is not None:
                drafts[key] = value
        named = {str(drafts.get(key)) for key in ("method", "model")} & set(DRAFT_METHODS)
        return cls(
            cache_dtype=options.text("--kv-cache-dtype") or "auto",
            skips_layers=options.text("--kv-cache-dtype-skip-layers") is not None,
            context_ranks=max(
                options.count("--decode-context-parallel-size", 1),
                options.count("--prefill-context-parallel-size", 1),
            ),
            offloads=options.number("--kv-offloading-size", 0) > 0,
            connects=bool(options.mapping("--kv-transfer-config")),
            drafts=(named.pop() if named else "a model") if drafts else None,
            caches_prefixes=options.switch("--enable-prefix-caching") is not False,
            microbatches=bool(options.switch("--enable-dbo")),
            one_kind_of_pages=bool(options.switch("--disable-hybrid-kv-cache-manager")),
            sleeps=bool(options.switch("--enable-sleep-mode")),
            page=options.count("--block-size", 0) or None,
        )

    def problems(self, profile: ClusterProfile) -> Iterator[str]:
        """What would give wrong results with a profile; each names the option and what to do."""
        online = profile.membership != STATIC
        if (problem := cache_problem(self.cache_dtype, self.dtype)) is not None:
            yield problem
        if (problem := page_size_problem(self.page)) is not None:
            yield problem
        if self.skips_layers:
            yield (
                "a K,V cache of 8 bits in some layers only: leave out --kv-cache-dtype-skip-layers"
            )
        if self.context_ranks > 1:
            yield (
                "context parallelism: leave out --decode-context-parallel-size and "
                "--prefill-context-parallel-size"
            )
        if self.offloads:
            yield "pages that are moved off the GPU: leave out --kv-offloading-size"
        elif self.connects:
            yield (
                "K,V connectors, as memberships do not travel with the pages: leave out "
                "--kv-transfer-config"
            )
        if self.drafts is not None and self.drafts not in DRAFT_METHODS:
            yield (
                "drafts of a model: use --speculative-config or --spec-method with one of "
                f"{', '.join(DRAFT_METHODS)}"
            )
        if profile.recent and self.one_kind_of_pages:
            yield (
                "an exact recent window, whose pages are of a kind of their own, without vLLM's "
                "hybrid manager: leave out --disable-hybrid-kv-cache-manager"
            )
        if profile.recent and self.sleeps:
            yield (
                "sleep mode with an exact recent window, as waking up with it is not tested: "
                "leave out --enable-sleep-mode"
            )
        if self.microbatches and (profile.recent or online):
            yield "microbatches (--enable-dbo) with an exact recent window or online memberships"


def cache_problem(cache_dtype: str, dtype: str | None) -> str | None:
    """Why K and V cannot be kept so, of a model in ``dtype``; None if they can."""
    if cache_dtype in ("auto", *EIGHT_BITS):
        return None
    if cache_dtype in CACHE_DTYPES and dtype in (None, cache_dtype):
        return None
    return f"a K,V cache of {cache_dtype}: use --kv-cache-dtype auto or fp8"


def page_size_problem(page: int | None) -> str | None:
    """Why pages cannot have so many tokens; None if they can, or where vLLM chooses."""
    if not page or page % PAGE_MULTIPLE == 0:
        return None
    return f"pages of {page} tokens: --block-size takes multiples of {PAGE_MULTIPLE}"


def refuse(asked: Asked, profile: ClusterProfile, model: str = "") -> None:
    """Stop at options that would give wrong results.

    Args:
        asked: the options.
        profile: that is to be served.
        model: its folder, or its name; "" where neither is known.

    Raises:
        UnsupportedModelError: names the option and what to do.
        ProfileError: the profile has a refit, which has to be exported, or is of weights that hold
            one, which these do not.
    """
    for problem in asked.problems(profile):
        raise UnsupportedModelError(f"clustered heads do not support {problem}")
    require_refit_weights(profile.provenance, model)
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
