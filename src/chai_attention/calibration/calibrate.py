"""`calibrate`: from a model and text to a `ClusterProfile` (CHAI, section 3.2, and beyond)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.budget import most_tries
from chai_attention.calibration.candidates import Candidates
from chai_attention.calibration.checks import require_tokens
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.finish import Finish
from chai_attention.calibration.held_out import held_out_count, spread
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.steps import Steps
from chai_attention.calibration.texts import check_numbers, windows_of
from chai_attention.errors import CalibrationError
from chai_attention.integrations.transformers.corrections import Corrections
from chai_attention.integrations.transformers.support import (
    ModelShape,
    attention_modules,
    describe,
    unwrapped,
)
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress, quiet

DEFAULT_LENGTH = 256
DEFAULT_SAMPLES = {False: 1024, True: 256}  # a backward pass costs three forwards
HELD_OUT = 64  # windows on which a loss is measured
BATCH_SIZE = 8


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | Tensor,
    *,
    samples: int | None = None,
    length: int | None = None,
    held_out: Tensor | int = HELD_OUT,
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
    merging heads costs is found by one backward pass per window of text, a dynamic program deals
    the removals out to the layers, and the loss of what it chose is measured.

    Args:
        model: a supported causal language model, or a PEFT model around one.
        tokenizer: its tokenizer.
        texts: sample text, documents, or ready windows of tokens ``[N, S]`` int64.
        samples: windows of text to use; None for 256 with gradient costs, else 1024.
        length: tokens per window; None for 256, or the model's maximum if that is less.
        held_out: windows ``[N, S]`` on which loss is measured, or how many further windows of the
            text to keep back for that. If the text has not enough for ``samples`` and these, at
            most a third are kept back, which a `ChaiWarning` says. None are kept back if there is
            nothing to measure: with given ``clusters`` or the elbow, and without a refit.
        measure: whether to measure what a saving (``save``, ``removed``) costs and to write it
            into the profile; a ``max_loss`` is always measured.
        seed: which windows of the text are used.
        batch_size: windows per forward.
        source: what to call the text in the profile.
        store: evidence of earlier calibrations of this model on the same windows, to be used again
            and added to; one of other windows is left alone.
        progress: called with (which step of how many is going on, done, in all of that step).
        settings: fields of `Settings`: recipe, cost, membership, target, window, recent, sinks,
            refit, a budget (max_loss, save, removed, clusters or max_error), ...

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
        chosen = Settings(**settings).resolve(describe(model))
        if chosen.refit != "none":  # found now, not after the evidence
            Corrections.require_plain(attention_modules(model))
        text = _divided(model, tokenizer, texts, chosen, samples, length, held_out, measure, seed)
        if store is None or not _serves(store, model, text.windows):
            store = EvidenceStore(model, text.windows, batch_size)
        return _calibrated(model, text, chosen, store, batch_size, source, seed, progress)


@dataclass(frozen=True)
class _Text:
    """Windows ``[N, S]`` to learn from, and ``[M, S]`` to measure on if anything is measured."""

    windows: Tensor
    check: Tensor | None
    measured: bool


def _divided(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | Tensor,
    chosen: Settings,
    samples: int | None,
    length: int | None,
    held_out: Tensor | int,
    measure: bool,
    seed: int,
) -> _Text:
    """Cut text to windows, and keep some of them back if there is something to measure."""
    chosen.given_clusters(describe(model))  # a mistake should not wait for the text
    if samples is None:
        samples = DEFAULT_SAMPLES[chosen.differentiated]
    check_numbers(samples, seed)
    length = window_length(model, length)
    if chosen.recent and chosen.recent + (chosen.sinks or 0) >= length:
        raise CalibrationError(
            f"a recent window of {chosen.recent} + {chosen.sinks} tokens covers all {length} of a "
            "window of text: take a larger length, or a smaller recent (0 for none)"
        )
    measured = chosen.max_loss is not None or (chosen.measurable and measure)
    holds = measured or chosen.refit != "none"
    extra = held_out if holds and isinstance(held_out, int) else 0
    windows = windows_of(texts, tokenizer, samples + extra, length, seed)
    check = held_out if isinstance(held_out, Tensor) and holds else None
    if holds and check is None:
        windows, check = spread(windows, held_out_count(len(windows), samples, extra, length))
    if check is not None and (
        check.ndim != 2 or len(check) < 2 or check.shape[1] < 2 or check.dtype != torch.long
    ):
        raise CalibrationError(
            "held_out is how many windows to keep back, or at least 2 windows of tokens "
            "[N, S], int64"
        )
    for part in (windows, check):
        if part is not None:
            require_tokens(model, part)
    # a tensor that was made in inference mode cannot be part of a backward pass
    windows = windows.clone() if windows.is_inference() else windows
    return _Text(windows, check, measured)


def _calibrated(
    model: PreTrainedModel,
    text: _Text,
    chosen: Settings,
    store: EvidenceStore,
    batch_size: int,
    source: str,
    seed: int,
    progress: Progress,
) -> ClusterProfile:
    """Collect evidence, and make the profile that was asked for of it."""
    shape = describe(model)
    passes = len(store.missing(chosen))
    steps = Steps(progress, *steps_of(passes, chosen, text.measured, shape))
    evidence = store.get(chosen, steps)
    provenance = _provenance(chosen, source, text.windows, seed)
    candidates = Candidates(shape, chosen, evidence, provenance)
    finish = Finish(model, chosen, text.windows, text.check, batch_size, steps)
    if (wanted := chosen.given_clusters(shape)) is not None:
        return finish.unmeasured(candidates.profile(wanted))
    if chosen.clusters == "elbow":
        assert chosen.max_error is not None
        return finish.unmeasured(candidates.at_elbow(chosen.max_error))
    if chosen.max_loss is not None:
        return finish.within_loss(candidates)
    if chosen.save is not None:
        asked = {"save": chosen.save}
        units = candidates.units_to_save(chosen.save)
        if units == candidates.most < 2 * chosen.save * candidates.units:
            most = candidates.remove(units).saved(shape, 10**9)
            raise CalibrationError(
                f"save {chosen.save:.1%} is more than this model can: K of all but one head a "
                f"layer is {most:.1%} of its K,V bytes"
            )
    else:
        assert chosen.removed is not None
        asked = {"removed": chosen.removed}
        units = candidates.units_for(chosen.removed)
    profile = candidates.remove(units)
    return finish.measured(profile, asked) if text.measured else finish.unmeasured(profile)


def steps_of(passes: int, chosen: Settings, measured: bool, shape: ModelShape) -> tuple[int, bool]:
    """Steps of a calibration with so many passes, and whether a search may end before them."""
    if chosen.max_loss is not None:
        free, counts = sum(shape.clusterable), chosen.layer_counts(shape)
        tries = most_tries(free * (len(counts) - 1), shape.layers * len(counts) // 20)
        return passes + 1 + tries, True
    return passes + (2 if measured else int(chosen.refit != "none")), False


def window_length(model: PreTrainedModel, length: int | None = None) -> int:
    """Tokens per window of sample text: ``length``, or what fits the model.

    Raises:
        CalibrationError: a length that the model cannot read.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if length < 2 or (limit is not None and length > limit):
        most = f"at most {limit}, the longest text of this model" if limit else "of any number"
        raise CalibrationError(f"length must be at least 2 and {most}, not {length}")
    return length


def _serves(store: EvidenceStore, model: PreTrainedModel, windows: Tensor) -> bool:
    """Whether the store is about this model and text."""
    return store.model is model and torch.equal(store.windows, windows)


def _provenance(settings: Settings, source: str, windows: Tensor, seed: int) -> dict[str, Any]:
    """What a profile remembers of its making."""
    if settings.cost == "scores":
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
        "text": source,
        "samples": windows.shape[0],
        "length": windows.shape[1],
        "seed": seed,
        "chai_attention": version("chai-attention"),
    }
    return {name: value for name, value in found.items() if value is not None}
