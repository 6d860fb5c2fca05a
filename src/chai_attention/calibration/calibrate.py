"""`calibrate`: from a model and text to a `ClusterProfile` (CHAI, section 3.2, and beyond)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.budget import largest_within
from chai_attention.calibration.candidates import Candidates, units_name
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.texts import windows_of
from chai_attention.errors import CalibrationError
from chai_attention.evaluation.perplexity import Loss, PairedRise, paired_rise, token_loss
from chai_attention.integrations.transformers.enable import enabled
from chai_attention.integrations.transformers.support import describe
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress, quiet

DEFAULT_LENGTH = 256
DEFAULT_SAMPLES = {False: 1024, True: 256}  # a backward pass costs three forwards
HELD_OUT = 64  # windows on which a loss is measured


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | Tensor,
    *,
    samples: int | None = None,
    length: int | None = None,
    held_out: Tensor | int = HELD_OUT,
    seed: int = 0,
    batch_size: int = 8,
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
        model: a supported causal language model.
        tokenizer: its tokenizer.
        texts: sample text, documents, or ready windows of tokens ``[N, S]`` int64.
        samples: windows of text to use; None for 256 with gradient costs, else 1024.
        length: tokens per window; None for 256, or the model's maximum if that is less.
        held_out: windows ``[N, S]`` on which loss is measured, or how many of the text's windows
            to keep back for that (at most a third). Without a loss to measure none are kept back.
        seed: which windows of the text are used.
        batch_size: windows per forward.
        source: what to call the text in the profile.
        store: evidence of earlier calibrations of this model on the same windows, to be used again
            and added to; one of other windows is left alone.
        progress: called with (what is going on, windows done, windows in all).
        settings: fields of `Settings`: recipe, cost, membership, target, window, recent, sinks,
            refit, a budget (max_loss, save, removed, clusters or max_error), ...

    Returns:
        A profile with error curves and head similarities; the same arguments give the same one.

    Raises:
        CalibrationError: options that contradict each other, too little text, or a budget that
            cannot be met.
        UnsupportedModelError: the model cannot be clustered.
    """
    shape = describe(model)
    unknown = sorted(set(settings) - {field.name for field in fields(Settings)})
    if unknown:
        raise TypeError(f"calibrate() has no option {', '.join(unknown)}")
    chosen = Settings(**settings).resolve(shape)
    wanted = chosen.given_clusters(shape)
    if samples is None:
        samples = DEFAULT_SAMPLES[chosen.differentiated]
    if samples < 1:
        raise CalibrationError(f"calibration needs at least 1 sample, not {samples}")
    measured = chosen.max_loss is not None or chosen.refit != "none"
    extra = held_out if measured and isinstance(held_out, int) else 0
    length = window_length(model, length)
    if chosen.recent and chosen.recent + (chosen.sinks or 0) >= length:
        raise CalibrationError(
            f"a recent window of {chosen.recent} + {chosen.sinks} tokens covers all {length} of a "
            "window of text: take a larger length, or a smaller recent (0 for none)"
        )
    windows = windows_of(texts, tokenizer, samples + extra, length, seed)
    check = held_out if isinstance(held_out, Tensor) else None
    if measured and check is None:
        windows, check = _keep_back(windows, extra)
    if store is None or not _serves(store, model, windows):
        store = EvidenceStore(model, windows, batch_size)
    evidence = store.get(chosen, progress)
    provenance = _provenance(chosen, source, windows, seed)
    candidates = Candidates(shape, chosen, evidence, provenance)
    finish = _Finish(model, chosen, windows, check, batch_size, progress)
    if wanted is not None:
        return finish(candidates.profile(wanted))
    if chosen.clusters == "elbow":
        assert chosen.max_error is not None
        return finish(candidates.at_elbow(chosen.max_error))
    if chosen.save is not None:
        units = candidates.units_to_save(chosen.save)
        if units == candidates.most < 2 * chosen.save * candidates.units:
            most = candidates.remove(units).saved(shape, 10**9)
            raise CalibrationError(
                f"save {chosen.save:.1%} is more than this model can: K of all but one head a "
                f"layer is {most:.1%} of its K,V bytes"
            )
        return finish(candidates.remove(units))
    if chosen.removed is not None:
        return finish(candidates.remove(candidates.units_for(chosen.removed)))
    return finish.within_loss(candidates)


class _Finish:
    """Refits and measures profiles, on the windows kept back for that."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        windows: Tensor,
        check: Tensor | None,
        batch_size: int,
        progress: Progress,
    ):
        self.model = model
        self.settings = settings
        self.windows = windows
        self.check = check
        self.batch_size = batch_size
        self.progress = progress
        self._baseline: Loss | None = None

    def __call__(self, profile: ClusterProfile) -> ClusterProfile:
        """Refit the output weights if that was asked for."""
        if self.settings.refit == "none" or self.settings.refit is None:
            return profile
        from chai_attention.calibration.refit import refit

        return refit(
            self.model,
            profile,
            self.windows,
            kind=self.settings.refit,
            held_out=self.check,
            batch_size=self.batch_size,
            progress=lambda done, total: self.progress("refitting", done, total),
        )

    def rise_of(self, profile: ClusterProfile, what: str) -> PairedRise:
        """Measure the perplexity rise on held-out text."""
        if self._baseline is None:
            self._baseline = self._loss("perplexity of the model")
        with enabled(self.model, profile):
            return paired_rise(self._baseline, self._loss(what))

    def _loss(self, what: str) -> Loss:
        assert self.check is not None
        return token_loss(
            self.model,
            self.check,
            batch_size=self.batch_size,
            progress=lambda done, total: self.progress(what, done, total),
        )

    def within_loss(self, candidates: Candidates) -> ClusterProfile:
        """Return the profile that removes most within the loss asked for."""
        max_loss = self.settings.max_loss
        assert max_loss is not None
        assert self.check is not None
        profiles: dict[int, ClusterProfile] = {}
        unit = units_name(candidates.target)

        def measure(units: int) -> PairedRise:
            profiles[units] = self(candidates.remove(units))
            return self.rise_of(profiles[units], f"perplexity without {units} {unit}")

        kept = largest_within(measure, candidates.most, max_loss, candidates.units // 20)
        if kept.units == 0:
            raise CalibrationError(
                f"max_loss {max_loss:.2%} cannot be met: already the cheapest of all {unit} costs "
                f"{kept.rise} perplexity on {len(self.check)} held-out windows. Ask for more, or "
                "measure on more text (the standard error counts 1.6 times)"
            )
        profile = profiles[kept.units]
        shape, length = candidates.shape, self.check.shape[1]
        return replace(
            profile,
            promise={
                "max_loss": max_loss,
                "rise": round(kept.rise.rise, 6),
                "standard_error": round(kept.rise.standard_error, 6),
                "windows": len(self.check),
                "length": length,
                "saved": round(profile.saved(shape, length), 6),
                "saved_per_token": round(profile.saved(shape, 10**9), 6),
                "profiles_tried": kept.tried,
            },
        )


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


def _keep_back(windows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split evenly spread windows off for measuring: at most a third of all."""
    count = min(count, len(windows) // 3)
    if count < 2:
        raise CalibrationError(
            f"measuring a loss needs at least 6 windows of text, this is enough for "
            f"{len(windows)}: give more text or a shorter length"
        )
    back = {round((i + 0.5) * len(windows) / count - 0.5) for i in range(count)}
    rest = [i for i in range(len(windows)) if i not in back]
    return windows[rest], windows[sorted(back)]


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
