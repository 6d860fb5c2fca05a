"""Calibration as the command line asks for it: from named sources of text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.calibrate import (
    BATCH_SIZE,
    calibrate,
    check_window,
    default_samples,
    stretched,
    stretches,
    window_length,
)
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.evidence_file import EvidenceFile
from chai_attention.calibration.held_out import held_out_count
from chai_attention.calibration.perplexity import PairedRise, paired_rise, token_loss
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.sources import (
    Source,
    mixed_windows,
    read_sources,
    split_windows,
    warn_uneven,
)
from chai_attention.calibration.template import template_tokens
from chai_attention.calibration.texts import (
    SELF,
    beginning,
    check_numbers,
    check_source,
    cut_windows,
)
from chai_attention.errors import CalibrationError, ChaiWarning
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.digest import weights_digest
from chai_attention.integrations.transformers.enable import enabled
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress, quiet
from chai_attention.results import file_digest
from chai_attention.runtime.shape import describe

START, CONTENT = "start", "content"


@dataclass(frozen=True)
class TextRequest:
    """Which text a calibration uses.

    Attributes:
        sources: where it comes from, with weights.
        samples: windows to learn from; None for the cost's usual number.
        held_out: further windows to measure a loss on.
        length: tokens per window; None for what the settings and the model make of it.
        seed: which windows.
        probe_from: where the probe window begins: "start", or "content" after a chat template.
    """

    sources: Sequence[Source]
    samples: int | None = None
    held_out: int = 64
    length: int | None = None
    seed: int = 0
    probe_from: str = START

    def check(self) -> None:
        """Raise `CalibrationError` for what can be seen without a model."""
        if self.probe_from not in (START, CONTENT):
            raise CalibrationError(f"--probe-from is start or content, not {self.probe_from!r}")
        check_numbers(1 if self.samples is None else self.samples, self.seed)
        for source in self.sources:
            check_source(source.name)

    def samples_for(self, settings: Settings) -> int:
        """Windows to learn from, with these resolved settings."""
        if self.samples is None:
            return default_samples(settings)
        return self.samples

    def about(self, model: PreTrainedModel) -> dict[str, Any]:
        """What identifies the text and the model, to the bit."""
        packages = ("chai-attention", "torch", "transformers")
        return {
            "weights": weights_digest(model),
            "dtype": str(model.dtype),
            "device": input_device(model).type,
            "text": [[s.name, s.weight, file_digest(s.name)] for s in self.sources],
            "sizes": [self.samples, self.held_out, self.length, self.seed],
            "versions": {name: version(name) for name in packages},
        }

    @property
    def label(self) -> str:
        """What the text is called in a profile."""
        names = [Path(s.name).name if Path(s.name).is_file() else s.name for s in self.sources]
        if len(names) == 1:
            return names[0]
        total = sum(source.weight for source in self.sources)
        return ", ".join(
            f"{name} {source.weight / total:.0%}"
            for name, source in zip(names, self.sources, strict=True)
        )


@dataclass(frozen=True)
class Prepared:
    """A calibration whose text is read: all that is left is work.

    Attributes:
        settings: of the calibration, not resolved.
        windows: ``[N, S]`` tokens to learn from.
        held: ``[M, S]`` tokens to measure on, None if nothing is measured.
        held_sources: ``[M]``, the index of each one's source.
        longer: ``[L, T]`` tokens to measure on, too, of the same text; None for none.
    """

    settings: Settings
    windows: Tensor
    held: Tensor | None
    held_sources: Tensor | None
    longer: Tensor | None = None


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: TextRequest,
    settings: Settings,
    progress: Progress = quiet,
    kept: EvidenceFile | None = None,
) -> Prepared:
    """Check what is asked of the model, and read the text.

    Raises:
        CalibrationError: options that contradict each other, or text that cannot be had.
    """
    shape = describe(model)
    resolved = settings.resolve(shape)
    resolved.given_clusters(shape)  # a mistake should not wait for the text
    if request.probe_from == CONTENT:
        settings = replace(settings, probe_start=template_tokens(tokenizer))
    samples = request.samples_for(resolved)
    measured = resolved.measurable or resolved.refit != "none"
    length = window_length(model, resolved, request.length)
    check_window(resolved, length)
    found: dict[int, Tensor] = {}
    written = any(source.name == SELF for source in request.sources)
    longer = stretches(model, resolved, length) if measured and not written else []
    texts = read_sources(
        request.sources,
        tokenizer,
        samples + (request.held_out if measured else 0),
        length,
        request.seed,
        longest=length * max([1, *longer]),
        progress=progress,
    )

    def read(samples: int, length: int) -> Tensor:
        windows, found[length] = mixed_windows(
            request.sources, model, tokenizer, samples, length, request.seed,
            texts=texts, kept=kept, progress=progress,
        )  # fmt: skip
        return windows

    if not measured:
        return Prepared(settings, read(samples, length), None, None)
    if written:
        windows, times = read(samples + request.held_out, length), 1  # long texts cost too much
    else:
        windows, times = stretched(model, resolved, read, samples, request.held_out, length)
    source = found[times * length]
    count = held_out_count(
        len(windows), -(-samples // times), -(-request.held_out // times), times * length
    )
    (windows, source), (held, held_source) = split_windows(windows, source, count)
    if times == 1:
        return Prepared(settings, windows, held, held_source)
    before = beginning(tokenizer)
    short = cut_windows(held, length, before)
    return Prepared(
        settings,
        cut_windows(windows, length, before),
        short,
        held_source.repeat_interleave(len(short) // len(held)),
        held,
    )


def calibrate_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: TextRequest,
    settings: Settings,
    progress: Progress,
    evidence: Path | None = None,
) -> tuple[ClusterProfile, str | None]:
    """Calibrate on mixed text; return the profile and a warning about it, if there is one.

    With several sources and a budget, the loss is also measured on each source's own held-out
    windows: the warning says if one of them pays far more than another.

    Args:
        model: a supported causal language model.
        tokenizer: its tokenizer.
        request: the text.
        settings: of the calibration.
        progress: called with (what is going on, done, in all).
        evidence: file that keeps what was found if there is an interrupt, and that an interrupted
            calibration is continued from. Whoever writes the profile deletes it.

    Raises:
        CalibrationError: as `calibrate`, and for text that cannot be had.
    """
    file = None if evidence is None else EvidenceFile(evidence, request.about(model))
    try:
        ready = prepare(model, tokenizer, request, settings, progress, file)
        store = EvidenceStore(model, ready.windows, BATCH_SIZE, file)
        profile = calibrate(
            model,
            tokenizer,
            ready.windows,
            samples=len(ready.windows),
            length=ready.windows.shape[1],
            held_out=0 if ready.held is None else ready.held,
            longer=ready.longer,
            seed=request.seed,
            batch_size=BATCH_SIZE,
            source=request.label,
            store=store,
            progress=progress,
            **ready.settings.given(),
        )
    except BaseException:  # an interrupt, too, and a budget that cannot be met
        if file is not None and file.flush():
            warnings.warn(
                f"what was found is kept in {file.path}: the same command goes on from it",
                ChaiWarning,
                stacklevel=2,
            )
        raise
    warning = None
    if ready.held is not None and ready.held_sources is not None and len(request.sources) > 1:
        names = [source.name for source in request.sources]
        rises = rises_by_source(model, profile, ready.held, ready.held_sources, names)
        warning = warn_uneven(rises)
    return profile, warning


def rises_by_source(
    model: PreTrainedModel,
    profile: ClusterProfile,
    windows: Tensor,
    sources: Tensor,
    names: Sequence[str],
) -> dict[str, PairedRise]:
    """Perplexity rise on the windows ``[N, S]`` of every source (index ``[N]``) that has some."""
    rises = {}
    for index, name in enumerate(names):
        own = windows[torch.nonzero(sources == index)[:, 0]]
        if len(own):
            baseline = token_loss(model, own)
            with enabled(model, profile):
                rises[name] = paired_rise(baseline, token_loss(model, own))
    return rises
