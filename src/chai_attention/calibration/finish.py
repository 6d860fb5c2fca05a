"""From candidates to the final profile: refit, measurement, search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.budget import largest_within
from chai_attention.calibration.candidates import Candidates
from chai_attention.calibration.checks import not_finite
from chai_attention.calibration.data import CalibrationData
from chai_attention.calibration.perplexity import Loss, PairedRise, paired_rise, token_loss
from chai_attention.calibration.recall_check import RecallCheck, RecallFall
from chai_attention.calibration.settings import Resolved
from chai_attention.calibration.split_candidates import SplitCandidates
from chai_attention.calibration.steps import Steps
from chai_attention.errors import CalibrationError
from chai_attention.integrations.transformers.enable import enabled
from chai_attention.profile import FOR_EVER, ClusterProfile
from chai_attention.runtime.shape import describe


@dataclass(eq=False)
class Finish:
    """Refits and measures profiles.

    Attributes:
        model: without clustered heads.
        settings: what was asked for.
        data: tokens that were learnt from, and that are measured on.
        recall: questions to ask as well; None for none.
        batch_size: sequences per forward.
        steps: reports the progress.
    """

    model: PreTrainedModel
    settings: Resolved
    data: CalibrationData
    recall: RecallCheck | None
    batch_size: int
    steps: Steps
    _baselines: Sequence[Loss] = ()

    def unmeasured(self, profile: ClusterProfile) -> ClusterProfile:
        """Refit the profile if that was asked for."""
        if self.settings.refits:
            self.steps.begin("refitting")
        return self._refit(profile)

    def measured(self, profile: ClusterProfile, asked: dict[str, Any]) -> ClusterProfile:
        """Refit the profile if that was asked for, and write down what it costs.

        Raises:
            CalibrationError: the loss is no number.
        """
        self._measure_baseline()
        self.steps.begin("refitting" if self.settings.refits else "perplexity with clusters")
        profile = self._refit(profile)
        rises = self._rises(profile, "perplexity with clusters")
        if not all(math.isfinite(rise.rise) for rise in rises):
            raise not_finite(self.model, "the loss with what was asked for removed")
        return self._promise(profile, asked, rises, self._recalled(profile), 1)

    def within_loss(self, candidates: Candidates | SplitCandidates) -> ClusterProfile:
        """Return the profile that removes most within the loss asked for.

        Raises:
            CalibrationError: not even the cheapest unit keeps to it.
        """
        max_loss = self.settings.max_loss
        assert max_loss is not None
        max_recall_loss = self.settings.max_recall_loss
        profiles: dict[int, ClusterProfile] = {}
        falls: dict[int, RecallFall | None] = {}
        unit = candidates.unit
        self._measure_baseline()

        def measure(units: int) -> list[PairedRise]:
            what = f"perplexity without {units} {unit}"
            self.steps.begin("refitting" if self.settings.refits else what)
            profiles[units] = self._refit(candidates.remove(units))
            return self._rises(profiles[units], what)

        def recalls(units: int) -> bool:
            fall = falls[units] = self._recalled(profiles[units])
            return fall is None or max_recall_loss is None or fall.within(max_recall_loss)

        kept = largest_within(
            measure, candidates.most, max_loss, candidates.guess, candidates.resolution, recalls
        )
        if kept.units == 0:
            worst = max(kept.rises, key=lambda rise: rise.rise)
            if not all(math.isfinite(rise.rise) for rise in kept.rises):
                raise not_finite(self.model, f"the loss without the cheapest of all {unit}")
            bound = f"max_loss {max_loss:.2%}"
            cost = f"{worst} perplexity on {len(self.data.measured[0])} held-out sequences"
            if (fall := falls.get(1)) is not None:  # the loss was kept
                bound, cost = f"max_recall_loss {max_recall_loss:.1%}", f"{fall} of recall"
            raise CalibrationError(
                f"{bound} cannot be met: already the cheapest of all {unit} costs {cost}. Ask for "
                "more, or measure on more text (the standard error counts 1.6 times)"
            )
        asked: dict[str, Any] = {"max_loss": max_loss}
        fall = falls[kept.units]
        if fall is not None and max_recall_loss is not None:
            asked["max_recall_loss"] = max_recall_loss
        return self._promise(profiles[kept.units], asked, kept.rises, fall, kept.tried)

    def _promise(
        self,
        profile: ClusterProfile,
        asked: dict[str, Any],
        rises: Sequence[PairedRise],
        fall: RecallFall | None,
        tried: int,
    ) -> ClusterProfile:
        shape = describe(self.model)
        found = [
            {
                "rise": round(rise.rise, 6),
                "standard_error": round(rise.standard_error, 6),
                "windows": len(sequences),
                "length": sequences.shape[1],
                "saved": round(profile.saved(shape, sequences.shape[1]), 6),
            }
            for rise, sequences in zip(rises, self.data.measured, strict=True)
        ]
        promise: dict[str, Any] = {
            **asked,
            **found[0],
            "saved_per_token": round(profile.saved(shape, FOR_EVER), 6),
            "profiles_tried": tried,
        }
        if len(found) > 1:
            promise["longer"] = found[1]
        if self.recall is not None:
            promise["recall"] = {} if self.recall.note is None else {"note": self.recall.note}
        if fall is not None:
            promise["recall"] |= {
                "fall": round(fall.fall, 4),
                "standard_error": round(fall.standard_error, 4),
                "tasks": list(fall.tasks),
            }
        return replace(profile, promise=promise)

    def _recalled(self, profile: ClusterProfile) -> RecallFall | None:
        """How far recall falls with a profile; None if nothing is asked."""
        if self.recall is None or not self.recall.tasks:
            return None
        with enabled(self.model, profile):
            return self.recall.measure(self.model, self.steps.go_on("facts recalled"))

    def _refit(self, profile: ClusterProfile) -> ClusterProfile:
        if not self.settings.refits:
            return profile
        from chai_attention.calibration.refit import refit

        return refit(
            self.model,
            profile,
            self.data.sequences,
            kind=self.settings.refit,
            held_out=self.data.held_out,
            batch_size=self.batch_size,
            progress=self.steps.go_on("refitting"),
        )

    def _measure_baseline(self) -> None:
        self.steps.begin("perplexity of the model")
        self._baselines = [
            self._loss(text, "perplexity of the model") for text in self.data.measured
        ]
        if not all(loss.finite for loss in self._baselines):
            raise not_finite(self.model, "the loss of this model on held-out text")
        if self.recall is not None:
            self.recall.begin(self.model, self.steps.go_on("facts recalled by the model"))

    def _rises(self, profile: ClusterProfile, what: str) -> list[PairedRise]:
        """What a profile costs on the sequences, and on the longer ones."""
        with enabled(self.model, profile):
            return [
                paired_rise(baseline, self._loss(text, what))
                for baseline, text in zip(self._baselines, self.data.measured, strict=True)
            ]

    def _loss(self, text: Tensor, what: str) -> Loss:
        # as many tokens at a time
        batch = max(1, self.batch_size * self.data.measured[0].shape[1] // text.shape[1])
        return token_loss(self.model, text, batch_size=batch, progress=self.steps.go_on(what))
