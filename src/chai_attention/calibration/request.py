"""Calibration on named sources of text, as on the command line."""

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

from chai_attention.calibration.calibrate import calibrate_data
from chai_attention.calibration.data import CalibrationData, read_data, stretches
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.evidence_file import EvidenceFile
from chai_attention.calibration.perplexity import PairedRise, paired_rise, token_loss
from chai_attention.calibration.settings import Resolved, Settings
from chai_attention.calibration.sizes import (
    BATCH_SIZE,
    HELD_OUT,
    check_numbers,
    sequence_length,
    usual_samples,
)
from chai_attention.calibration.sources import Source, mixed_sequences, read_sources, warn_uneven
from chai_attention.calibration.template import template_tokens
from chai_attention.calibration.texts import SELF, beginning, check_source
from chai_attention.errors import CalibrationError, ChaiWarning
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.digest import weights_digest
from chai_attention.integrations.transformers.enable import enabled
from chai_attention.profile import STATIC, ClusterProfile
from chai_attention.progress import Progress, quiet
from chai_attention.results import file_digest
from chai_attention.runtime.shape import describe

START, CONTENT = "start", "content"


@dataclass(frozen=True)
class TextRequest:
    """Which text a calibration uses.

    Attributes:
        sources: where it comes from, with weights.
        samples: sequences to learn from; None for the cost's usual number.
        held_out: further sequences to measure a loss on.
        length: tokens per sequence; None for what the settings and the model make of it.
        probe_from: where the probe tokens begin: "start", or "content" after a chat template.
    """

    sources: Sequence[Source]
    samples: int | None = None
    held_out: int = HELD_OUT
    length: int | None = None
    probe_from: str = START

    def check(self, seed: int = 0) -> None:
        """Raise `CalibrationError` for what can be seen without a model, such as this seed."""
        if self.probe_from not in (START, CONTENT):
            raise CalibrationError(f"--probe-from is start or content, not {self.probe_from!r}")
        check_numbers(1 if self.samples is None else self.samples, seed)
        for source in self.sources:
            check_source(source.name)

    def samples_for(self, chosen: Resolved) -> int:
        """Sequences to learn from, with these settings."""
        return usual_samples(chosen) if self.samples is None else self.samples

    def about(self, model: PreTrainedModel, seed: int) -> dict[str, Any]:
        """What identifies the sequences and the model, to the bit."""
        packages = ("chai-attention", "torch", "transformers")
        return {
            "weights": weights_digest(model),
            "dtype": str(model.dtype),
            "device": input_device(model).type,
            "text": [[s.name, s.weight, file_digest(s.name)] for s in self.sources],
            "sizes": [self.samples, self.held_out, self.length, seed],
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

    def settle(
        self, settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Resolved:
        """Resolve settings for a model, and find where its probe tokens begin.

        Raises:
            CalibrationError: options that contradict each other or have no effect, or no template.
        """
        chosen = settings.resolve(describe(model))
        probes = settings.window is not None or self.probe_from == CONTENT
        if probes and chosen.membership == STATIC:
            raise CalibrationError(
                "a probe window decides memberships that are online or blend, and this one is "
                "static: leave out --window and --probe-from, or take another --membership"
            )
        if self.probe_from == CONTENT:
            chosen = replace(chosen, probe_start=template_tokens(tokenizer))
        return chosen

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chosen: Resolved,
        progress: Progress = quiet,
        kept: EvidenceFile | None = None,
    ) -> CalibrationData:
        """Read the text, once for sequences of all lengths that are tried.

        Raises:
            CalibrationError: text that cannot be read, or too little of it.
        """
        samples, length = self.samples_for(chosen), sequence_length(model, chosen, self.length)
        held_out = self.held_out if chosen.holds_out else 0
        # long texts of the model's own cost too much
        written = any(source.name == SELF for source in self.sources)
        times = [] if written or not chosen.holds_out else stretches(model, chosen, length)
        texts = read_sources(
            self.sources, tokenizer, samples + held_out, length, chosen.seed,
            longest=length * max([1, *times]), progress=progress,
        )  # fmt: skip

        def read(samples: int, length: int) -> tuple[Tensor, Tensor]:
            return mixed_sequences(
                self.sources, model, tokenizer, samples, length, chosen.seed,
                texts=texts, kept=kept, progress=progress,
            )  # fmt: skip

        if not chosen.holds_out:
            return CalibrationData(read(samples, length)[0])
        return read_data(read, samples, held_out, length, times, beginning(tokenizer))


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
    sequences: the warning says if one of them pays far more than another.

    Args:
        model: a supported causal language model.
        tokenizer: its tokenizer.
        request: the text.
        settings: of the calibration.
        progress: called with (what is going on, done, in all).
        evidence: file that keeps what was found if there is an interrupt, and that an interrupted
            calibration is continued from. Whoever writes the profile deletes it.

    Raises:
        CalibrationError: as `calibrate`, and for text that cannot be read.
    """
    file = None if evidence is None else EvidenceFile(evidence, request.about(model, settings.seed))
    try:
        chosen = request.settle(settings, model, tokenizer)
        data = request.read(model, tokenizer, chosen, progress, file)
        profile = calibrate_data(
            model, tokenizer, data, chosen, recall_asked=settings.recall is not None,
            source=request.label, progress=progress,
            store=EvidenceStore(model, data.sequences, BATCH_SIZE, file),
        )  # fmt: skip
    except BaseException:  # an interrupt, too, and a budget that cannot be met
        if file is not None and file.flush():
            warnings.warn(
                f"what was found is kept in {file.path}: the same command goes on from it",
                ChaiWarning,
                stacklevel=2,
            )
        raise
    if data.held_out is None or data.sources is None or len(request.sources) == 1:
        return profile, None
    names = [source.name for source in request.sources]
    rises = rises_by_source(model, profile, data.held_out, data.sources, names)
    return profile, warn_uneven(rises)


def rises_by_source(
    model: PreTrainedModel,
    profile: ClusterProfile,
    sequences: Tensor,
    sources: Tensor,
    names: Sequence[str],
) -> dict[str, PairedRise]:
    """Perplexity rise on the sequences ``[N, S]`` of every source (index ``[N]``) that has some."""
    rises = {}
    for index, name in enumerate(names):
        own = sequences[torch.nonzero(sources == index)[:, 0]]
        if len(own):
            baseline = token_loss(model, own)
            with enabled(model, profile):
                rises[name] = paired_rise(baseline, token_loss(model, own))
    return rises
