"""Calibration as the command line asks for it: from named sources of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.calibrate import DEFAULT_SAMPLES, calibrate, window_length
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.sources import (
    Source,
    mixed_windows,
    split_windows,
    warn_uneven,
)
from chai_attention.calibration.template import template_tokens
from chai_attention.calibration.texts import SELF, load_texts
from chai_attention.errors import CalibrationError
from chai_attention.evaluation.perplexity import PairedRise, paired_rise, token_loss
from chai_attention.hub import require_dataset
from chai_attention.integrations.transformers.enable import enabled
from chai_attention.integrations.transformers.support import describe
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress

START, CONTENT = "start", "content"


@dataclass(frozen=True)
class TextRequest:
    """Which text a calibration uses.

    Attributes:
        sources: where it comes from, with weights.
        samples: windows to learn from; None for the cost's usual number.
        held_out: further windows to measure a loss on.
        length: tokens per window; None for 256 or the model's maximum.
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
        for source in self.sources:
            path = Path(source.name)
            if source.name == SELF:
                continue
            if path.exists() or path.suffix:
                load_texts(source.name, tokens=1)
            else:
                require_dataset(source.name, CalibrationError)

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


def calibrate_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: TextRequest,
    settings: Settings,
    progress: Progress,
) -> tuple[ClusterProfile, str | None]:
    """Calibrate on mixed text; return the profile and a warning about it, if there is one.

    With several sources and a loss budget, the loss is also measured on each source's own
    held-out windows: the warning says if one of them pays far more than another.

    Raises:
        CalibrationError: as `calibrate`, and for text that cannot be had.
    """
    shape = describe(model)
    resolved = settings.resolve(shape)
    resolved.given_clusters(shape)  # a mistake should not wait for the text
    if request.probe_from == CONTENT:
        settings = replace(settings, probe_start=template_tokens(tokenizer))
    samples = request.samples
    if samples is None:
        samples = DEFAULT_SAMPLES[resolved.differentiated]
    if samples < 1:
        raise CalibrationError(f"calibration needs at least 1 sample, not {samples}")
    measured = resolved.max_loss is not None or resolved.refit != "none"
    length = window_length(model, request.length)
    wanted = samples + (request.held_out if measured else 0)
    progress("reading text", 0, 1)
    windows, source = mixed_windows(request.sources, model, tokenizer, wanted, length, request.seed)
    held = held_source = None
    if measured:
        count = min(request.held_out, len(windows) // 3)
        (windows, source), (held, held_source) = split_windows(windows, source, count)
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    profile = calibrate(
        model,
        tokenizer,
        windows,
        samples=len(windows),
        length=length,
        held_out=0 if held is None else held,
        seed=request.seed,
        source=request.label,
        progress=progress,
        **given,
    )
    warning = None
    if held is not None and held_source is not None and len(request.sources) > 1:
        names = [source.name for source in request.sources]
        warning = warn_uneven(rises_by_source(model, profile, held, held_source, names))
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
