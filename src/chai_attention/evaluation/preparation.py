"""Make comparators for a model, and fit them on calibration text, when an evaluation needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.sizes import sequence_length
from chai_attention.calibration.sources import Source, mixed_sequences
from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.profiled import NO_PROFILE, PROFILE, profile_digest
from chai_attention.evaluation.scorer import MHA
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress
from chai_attention.results import file_digest


@dataclass(frozen=True)
class Calibration:
    """What comparators are fitted with.

    Attributes:
        sources: calibration text, which holds none of the tasks' items.
        samples: windows of it.
        length: tokens per window; None for calibration's default.
        profile: the profile to evaluate; None: methods find their own.
        save: share of the K,V bytes that methods with a budget are to save; None: what the
            profile saves.
        seed: of every choice.
    """

    sources: tuple[Source, ...]
    samples: int = 128
    length: int | None = None
    profile: ClusterProfile | None = None
    save: float | None = None
    seed: int = 0

    def asked(self) -> dict[str, Any]:
        """Identify what comes out without making it: names, numbers and digests."""
        return {
            "profile": None if self.profile is None else profile_digest(self.profile),
            "save": self.save,
            "text": [
                {
                    "name": Path(source.name).name,
                    "weight": source.weight,
                    "digest": file_digest(source.name, 16),
                }
                for source in self.sources
            ],
            "samples": self.samples,
            "length": self.length,
        }


def comparator_names(
    compare: str | None,
    profile: ClusterProfile | None,
    model: PreTrainedModel | None = None,
    on_left_out: Callable[[str], None] = lambda message: None,
) -> tuple[str, ...]:
    """Names of a table's rows: MHA, with a profile "profile", and the comparators asked for.

    Args:
        compare: names separated by commas; "all" for every comparator that can run here; None for
            no more.
        profile: the profile to evaluate.
        model: what they are to run; None leaves out only those whose library is missing.
        on_left_out: called with a message for each comparator that "all" leaves out.

    Raises:
        EvaluationError: "profile" is asked for, and there is none.
    """
    from chai_attention.evaluation.comparators import registry

    names = [MHA] if profile is None else [MHA, PROFILE]
    for name in (compare or "").split(","):
        if name.strip() == "all":
            found, left_out = registry.available(profile, model)
            names += found
            for message in left_out:
                on_left_out(message)
        elif name.strip():
            names.append(name.strip())
    if PROFILE in names and profile is None:
        raise EvaluationError(NO_PROFILE)
    return tuple(dict.fromkeys(names))


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    progress: Progress,
    names: Sequence[str],
) -> Mapping[str, Comparator]:
    """Make comparators, and fit those that need it.

    Text is read, and windows are written by the model, only when one of them may learn from it.

    Raises:
        EvaluationError: "profile" without a profile.
        CalibrationError: text that cannot be used.
    """
    from chai_attention.evaluation.comparators import registry

    tokens: list[Tensor] = []
    if set(names) - {MHA, PROFILE}:
        length = sequence_length(model, length=calibration.length)
        windows, _ = mixed_sequences(
            calibration.sources, model, tokenizer, calibration.samples, length, calibration.seed
        )
        tokens = list(windows)
    return registry.comparators(
        names, model=model, tokens=tokens, profile=calibration.profile, save=calibration.save,
        seed=calibration.seed, tokenizer=tokenizer, progress=progress,
    )  # fmt: skip
