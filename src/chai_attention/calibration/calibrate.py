"""`calibrate`: from a model and text to a `ClusterProfile` (CHAI, section 3.2, and beyond)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.budget import most_tries
from chai_attention.calibration.candidates import Candidates
from chai_attention.calibration.checks import require_tokens
from chai_attention.calibration.evidence import Evidence, EvidenceStore
from chai_attention.calibration.finish import Finish
from chai_attention.calibration.held_out import LEAST_WINDOWS, held_out_count, spread
from chai_attention.calibration.recall_check import RecallCheck, recall_check
from chai_attention.calibration.recall_source import use_recall
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.split_candidates import SplitCandidates
from chai_attention.calibration.steps import Steps
from chai_attention.calibration.texts import (
    as_tokens,
    beginning,
    check_numbers,
    cut_windows,
    windows_of,
)
from chai_attention.errors import CalibrationError
from chai_attention.integrations.transformers.corrections import Corrections
from chai_attention.integrations.transformers.support import attention_modules
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress, quiet
from chai_attention.ranks import distinct_ranks
from chai_attention.runtime.shape import ModelShape, describe, unwrapped

DEFAULT_LENGTH = 256
STREAMING_LENGTH = 1024  # far keys have to be far away
DEFAULT_SAMPLES = {False: 1024, True: 256}  # a backward pass costs three forwards
STREAMING_SAMPLES = 64  # as many tokens
HELD_OUT = 64  # windows on which a loss is measured
STRETCHES = (4, 2)  # how much longer the windows are on which it is measured once more
LEAST_LONG = 2 * LEAST_WINDOWS  # long windows, with fewer of which short ones are taken
BATCH_SIZE = 8
_Described: TypeAlias = PreTrainedModel | PreTrainedConfig


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: str | Sequence[str] | Tensor,
    *,
    samples: int | None = None,
    length: int | None = None,
    held_out: Tensor | int = HELD_OUT,
    longer: Tensor | None = None,
    measure: bool = True,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    source: str = "given text",
    store: EvidenceStore | None = None,
    progress: Progress = quiet,
    **settings: Any,
) -> ClusterProfile:
    """Find which heads of each layer can share their scores.

    By default: the smallest K,V cache whose perplexity rise on held-out text is at most 1%. What
    it costs that a head uses another's scores of far keys, or sees none of them, is found by one
    backward pass per window of text, a dynamic program deals the savings out to the layers, and
    the loss of what it chose is measured, at the length of the windows and at a longer one.

    Args:
        model: a supported causal language model, or a PEFT model around one.
        tokenizer: its tokenizer; None for windows that are tokens already, which then hide no
            facts to recall.
        texts: sample text, documents, or ready windows of tokens ``[N, S]`` int64.
        samples: windows of text to use; None for 256 with gradient costs (64 with streaming heads,
            whose windows are longer), else 1024.
        length: tokens per window; None for 256 (1,024 with streaming heads), or the model's maximum
            if that is less.
        held_out: windows ``[N, S]`` on which loss is measured, or how many further windows of the
            text to keep back for that; with streaming heads pieces of text four (or two) times as
            long, if text and model allow, measured whole and in windows. If the text has not
            enough for ``samples`` and these, at most a third are kept back, which a `ChaiWarning`
            says. None are kept back if there is nothing to measure: with given ``clusters`` or the
            elbow, and without a refit.
        longer: windows ``[M, T]`` on which loss is measured, too; with ``held_out`` windows.
        measure: whether to measure what a saving (``save``, ``removed``) costs and to write it
            into the profile; a ``max_loss`` is always measured.
        seed: which windows of the text are used.
        batch_size: windows per forward.
        source: what to call the text in the profile.
        store: evidence of earlier calibrations of this model on the same windows, to be used again
            and added to; one of other windows is left alone.
        progress: called with (which step of how many is going on, done, in all of that step).
        settings: fields of `Settings`: recipe, cost, membership, target, window, recent, sinks,
            context, refit, a budget (max_loss, save, removed, clusters or max_error), recall,
            tensor_parallel, ...

    Returns:
        A profile with error curves and head similarities; the same arguments give the same one.

    Raises:
        CalibrationError: options that contradict each other, too little text, tokens that the
            model does not have, a loss that is no number, or a budget that cannot be met.
        UnsupportedModelError: the model cannot be clustered.
    """
    unknown = sorted(set(settings) - {field.name for field in fields(Settings)})
    if unknown:
        raise TypeError(f"calibrate() has no option {', '.join(unknown)}")
    with torch.inference_mode(False):  # gradients are needed, whatever the caller is in
        model = unwrapped(model)
        asked = Settings(**settings)
        chosen = asked.resolve(describe(model))
        if chosen.refit != "none":  # found now, not after the evidence
            Corrections.require_plain(attention_modules(model))
        text = _divided(
            model, tokenizer, texts, chosen, samples, length, held_out, longer, measure, seed
        )
        if store is None or not _serves(store, model, text.windows):
            store = EvidenceStore(model, text.windows, batch_size)
        recalling = use_recall(store, tokenizer, asked.recall, chosen, seed)
        recall = None
        if text.measured and (chosen.streams or chosen.max_recall_loss is not None):
            recall = recall_check(tokenizer, text.texts, seed)
        provenance = _provenance(chosen, source, text.windows, seed) | recalling
        return _calibrated(model, text, chosen, store, batch_size, provenance, recall, progress)


@dataclass(frozen=True)
class _Text:
    """Windows ``[N, S]`` to learn from, and ``[M, S]`` to measure on if anything is measured."""

    windows: Tensor
    check: Tensor | None
    longer: Tensor | None  # [L, T], to measure on, too
    measured: bool

    @property
    def texts(self) -> list[Tensor]:
        """All windows to measure on, the longest last."""
        return [text for text in (self.check, self.longer) if text is not None]


def _divided(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: str | Sequence[str] | Tensor,
    chosen: Settings,
    samples: int | None,
    length: int | None,
    held_out: Tensor | int,
    longer: Tensor | None,
    measure: bool,
    seed: int,
) -> _Text:
    """Cut text to windows, and keep some of them back if there is something to measure."""
    chosen.given_clusters(describe(model))  # a mistake should not wait for the text
    if tokenizer is None and not isinstance(texts, Tensor):
        raise CalibrationError("without a tokenizer, text is ready windows of tokens")
    samples = default_samples(chosen) if samples is None else samples
    check_numbers(samples, seed)
    if length is None and isinstance(texts, Tensor) and texts.ndim == 2:
        length = min(texts.shape[1], window_length(model, chosen))
    length = window_length(model, chosen, length)
    check_window(chosen, length)
    measured = chosen.max_loss is not None or (chosen.measurable and measure)
    holds = measured or chosen.refit != "none"
    extra = held_out if holds and isinstance(held_out, int) else 0
    check = held_out if isinstance(held_out, Tensor) and holds else None
    if check is None:
        longer = None
    tokens = texts if isinstance(texts, Tensor) else as_tokens(texts, tokenizer)
    if not holds or check is not None:
        windows = windows_of(tokens, tokenizer, samples, length, seed)
    else:

        def read(samples: int, length: int) -> Tensor:
            return windows_of(tokens, tokenizer, samples, length, seed)

        windows, times = stretched(model, chosen, read, samples, extra, length)
        wanted, kept = -(-samples // times), -(-extra // times)
        count = held_out_count(len(windows), wanted, kept, windows.shape[1])
        windows, check = spread(windows, count)
        if times > 1:
            before = [] if tokenizer is None else beginning(tokenizer)
            longer, (windows, check) = (
                check,
                (cut_windows(part, length, before) for part in (windows, check)),
            )
    if check is not None and (
        check.ndim != 2 or len(check) < 2 or check.shape[1] < 2 or check.dtype != torch.long
    ):
        raise CalibrationError(
            "held_out is how many windows to keep back, or at least 2 windows of tokens "
            "[N, S], int64"
        )
    for part in (windows, check, longer):
        if part is not None:
            require_tokens(model, part)
    # a tensor that was made in inference mode cannot be part of a backward pass
    windows = windows.clone() if windows.is_inference() else windows
    return _Text(windows, check, longer, measured)


def stretched(
    model: PreTrainedModel,
    chosen: Settings,
    read: Callable[[int, int], Tensor],
    samples: int,
    extra: int,
    length: int,
) -> tuple[Tensor, int]:
    """Read windows several times as long as ``length``, so that whole ones can be measured on.

    Args:
        model: bounds their length.
        chosen: resolved settings; only those with streaming heads measure at two lengths.
        read: called with (windows wanted, tokens per window); returns those that there are.
        samples: windows of ``length`` tokens to learn from.
        extra: windows of ``length`` tokens to measure on.
        length: tokens per window.

    Returns:
        windows ``[N, times * length]`` int64, and how many times as long they are: 1 if the text
        has few long ones.
    """
    for times in stretches(model, chosen, length):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                windows = read(-(-samples // times) + -(-extra // times), times * length)
            except CalibrationError:
                continue
        if len(windows) >= LEAST_LONG:
            for one in told:  # not what was said of windows that are not taken
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            return windows, times
    return read(samples + extra, length), 1


def stretches(model: PreTrainedModel, chosen: Settings, length: int) -> list[int]:
    """How many times as long as ``length`` `stretched` tries to make windows, longest first."""
    longest = longest_text(model)
    return [
        times
        for times in (STRETCHES if chosen.streams else ())
        if longest is None or times * length <= longest
    ]


def _calibrated(
    model: PreTrainedModel,
    text: _Text,
    chosen: Settings,
    store: EvidenceStore,
    batch_size: int,
    provenance: dict[str, Any],
    recall: RecallCheck | None,
    progress: Progress,
) -> ClusterProfile:
    """Collect evidence, and make the profile that was asked for of it."""
    shape, length = describe(model), text.windows.shape[1]
    recents = chosen.recents(length) if chosen.streams else None
    passes = len(store.missing(chosen, recents))
    steps = Steps(progress, *steps_of(passes, chosen, text.measured, shape))
    evidence = store.get_all(chosen, recents, steps)
    candidates = candidates_of(shape, chosen, evidence, provenance)
    finish = Finish(model, chosen, text.windows, text.texts, recall, batch_size, steps)
    if isinstance(candidates, Candidates):
        if (wanted := chosen.given_clusters(shape)) is not None:
            return finish.unmeasured(candidates.profile(wanted))
        if chosen.clusters == "elbow":
            assert chosen.max_error is not None
            return finish.unmeasured(candidates.at_elbow(chosen.max_error))
    if chosen.max_loss is not None:
        return finish.within_loss(candidates)
    profile = candidates.remove(candidates.units_asked())
    if not text.measured:
        return finish.unmeasured(profile)
    save, removed = chosen.save, chosen.removed
    return finish.measured(profile, {"removed": removed} if save is None else {"save": save})


def candidates_of(
    shape: ModelShape,
    chosen: Settings,
    evidence: Mapping[int, Evidence],
    provenance: dict[str, Any] | None = None,
) -> Candidates | SplitCandidates:
    """Profiles to choose from, by resolved settings; evidence by w."""
    if chosen.streams:
        return SplitCandidates(shape, chosen, evidence, provenance)
    (only,) = evidence.values()
    return Candidates(shape, chosen, only, provenance)


def steps_of(passes: int, chosen: Settings, measured: bool, shape: ModelShape) -> tuple[int, bool]:
    """Steps of a calibration with so many passes, and whether a search may end before them."""
    if chosen.max_loss is not None:
        free = sum(shape.clusterable)
        if chosen.streams:
            # of one rank: all save the same
            held = 2 * shape.kv_heads // distinct_ranks(shape.kv_heads, chosen.tensor_parallel)
            units = held * shape.layers
            # the guess is known with the costs only: the worst of all
            most = held * free
            tries = max(
                most_tries(most, 1 << n, max(1, units // 100)) for n in range(most.bit_length())
            )
        else:
            counts = chosen.layer_counts(shape)
            tries = most_tries(free * (len(counts) - 1), shape.layers * len(counts) // 20)
        return passes + 1 + tries, True
    return passes + (2 if measured else int(chosen.refit != "none")), False


def default_samples(chosen: Settings) -> int:
    """Windows of text to learn from, by resolved settings."""
    return STREAMING_SAMPLES if chosen.streams else DEFAULT_SAMPLES[chosen.differentiated]


def check_window(chosen: Settings, length: int) -> None:
    """Refuse an exact window that covers whole windows of ``length`` tokens.

    Raises:
        CalibrationError: says what to change.
    """
    recent = min(chosen.recents(length)) if chosen.streams else chosen.recent
    if recent and int(recent) + (chosen.sinks or 0) >= length:
        raise CalibrationError(
            f"a recent window of {recent} + {chosen.sinks} tokens covers all {length} of a "
            "window of text: take a larger length, or a smaller recent (0 for none)"
        )


def longest_text(model: _Described) -> int | None:
    """Tokens that a model, or one of this config, can read; None if its config does not say."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def window_length(
    model: _Described, chosen: Settings | None = None, length: int | None = None
) -> int:
    """Tokens per window of sample text: ``length``, or what settings want and fits the model.

    Raises:
        CalibrationError: a length that the model cannot read.
    """
    limit = longest_text(model)
    if length is None:
        usual = STREAMING_LENGTH if chosen is not None and chosen.streams else DEFAULT_LENGTH
        return min(usual, limit or usual)
    if length < 2 or (limit is not None and length > limit):
        most = f"at most {limit}, the longest text of this model" if limit else "of any number"
        raise CalibrationError(f"length must be at least 2 and {most}, not {length}")
    return length


def _serves(store: EvidenceStore, model: PreTrainedModel, windows: Tensor) -> bool:
    """Whether the store is about this model and text."""
    return store.model is model and torch.equal(store.windows, windows)


def _provenance(settings: Settings, source: str, windows: Tensor, seed: int) -> dict[str, Any]:
    """What a profile remembers of its making."""
    if settings.streams:
        method, features = "splits of heads", f"{settings.cost} costs"
    elif settings.cost == "scores":
        method = "k-means" if settings.target == "scores" else "best K/V heads"
        features = "causal attention probabilities"
    else:
        method, features = "k-medoids", f"{settings.cost} costs"
    elbow = settings.clusters == "elbow"
    chosen = "elbow" if elbow else "given counts" if settings.clusters is not None else "budget"
    found = {
        "recipe": settings.recipe,
        "method": f"{method}, {chosen}",
        "features": features,
        "cost": settings.cost,
        "max_error": settings.max_error if elbow else None,
        "save": settings.save,
        "removed": settings.removed,
        "context": settings.context,
        "text": source,
        "samples": windows.shape[0],
        "length": windows.shape[1],
        "seed": seed,
        "chai_attention": version("chai-attention"),
    }
    return {name: value for name, value in found.items() if value is not None}
