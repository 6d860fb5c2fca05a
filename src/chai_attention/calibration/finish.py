"""From candidates to the profile that is written: refit, measured, searched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.budget import largest_within
from chai_attention.calibration.candidates import Candidates
from chai_attention.calibration.checks import not_finite
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.split_candidates import SplitCandidates
from chai_attention.calibration.steps import Steps
from chai_attention.errors import CalibrationError
from chai_attention.evaluation.perplexity import Loss, PairedRise, paired_rise, token_loss
from chai_attention.integrations.transformers.enable import enabled
from chai_attention.integrations.transformers.support import describe
from chai_attention.profile import FOR_EVER, ClusterProfile


class Finish:
    """Refits and measures profiles, on the windows kept back for that.

    Args:
        model: without clustered heads.
        settings: resolved.
        windows: ``[N, S]`` tokens that were learnt from.
        check: ``[M, S]`` tokens to measure on; None if nothing is measured.
        longer: ``[L, T]`` tokens to measure on, too; None for none.
        batch_size: windows per forward.
        steps: what is told how far it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        windows: Tensor,
        check: Tensor | None,
        longer: Tensor | None,
        batch_size: int,
        steps: Steps,
    ):
        self.model = model
        self.settings = settings
        self.windows = windows
        self.check = check
        self._texts = [text for text in (check, longer) if text is not None]
        self.batch_size = batch_size
        self.steps = steps
        self._baselines: list[Loss] = []

    @property
    def refits(self) -> bool:
        """Whether output weights are refit."""
        return self.settings.refit not in (None, "none")

    def unmeasured(self, profile: ClusterProfile) -> ClusterProfile:
        """Refit the profile if that was asked for."""
        if self.refits:
            self.steps.begin("refitting")
        return self._refit(profile)

    def measured(self, profile: ClusterProfile, asked: dict[str, Any]) -> ClusterProfile:
        """Refit the profile if that was asked for, and write down what it costs.

        Raises:
            CalibrationError: the loss is no number.
        """
        self._measure_baseline()
        self.steps.begin("refitting" if self.refits else "perplexity with clusters")
        profile = self._refit(profile)
        rises = self._rises(profile, "perplexity with clusters")
        if not all(math.isfinite(rise.rise) for rise in rises):
            raise not_finite(self.model, "the loss with what was asked for removed")
        return self._promise(profile, asked, rises, 1)

    def within_loss(self, candidates: Candidates | SplitCandidates) -> ClusterProfile:
        """Return the profile that removes most within the loss asked for.

        Raises:
            CalibrationError: not even the cheapest unit keeps to it.
        """
        max_loss = self.settings.max_loss
        assert max_loss is not None
        assert self.check is not None
        profiles: dict[int, ClusterProfile] = {}
        unit = candidates.unit
        self._measure_baseline()

        def measure(units: int) -> list[PairedRise]:
            what = f"perplexity without {units} {unit}"
            self.steps.begin("refitting" if self.refits else what)
            profiles[units] = self._refit(candidates.remove(units))
            return self._rises(profiles[units], what)

        kept = largest_within(
            measure, candidates.most, max_loss, candidates.guess, candidates.resolution
        )
        if kept.units == 0:
            worst = max(kept.rises, key=lambda rise: rise.rise)
            if not all(math.isfinite(rise.rise) for rise in kept.rises):
                raise not_finite(self.model, f"the loss without the cheapest of all {unit}")
            raise CalibrationError(
                f"max_loss {max_loss:.2%} cannot be met: already the cheapest of all {unit} costs "
                f"{worst} perplexity on {len(self.check)} held-out windows. Ask for more, or "
                "measure on more text (the standard error counts 1.6 times)"
            )
        return self._promise(profiles[kept.units], {"max_loss": max_loss}, kept.rises, kept.tried)

    def _promise(
        self,
        profile: ClusterProfile,
        asked: dict[str, Any],
        rises: Sequence[PairedRise],
        tried: int,
    ) -> ClusterProfile:
        shape = describe(self.model)
        found = [
            {
                "rise": round(rise.rise, 6),
                "standard_error": round(rise.standard_error, 6),
                "windows": len(windows),
                "length": windows.shape[1],
                "saved": round(profile.saved(shape, windows.shape[1]), 6),
            }
            for rise, windows in zip(rises, self._texts, strict=True)
        ]
        promise: dict[str, Any] = {
            **asked,
            **found[0],
            "saved_per_token": round(profile.saved(shape, FOR_EVER), 6),
            "profiles_tried": tried,
        }
        if len(found) > 1:
            promise["longer"] = found[1]
        return replace(profile, promise=promise)

    def _refit(self, profile: ClusterProfile) -> ClusterProfile:
        if not self.refits:
            return profile
        from chai_attention.calibration.refit import refit

        assert self.settings.refit is not None
        return refit(
            self.model,
            profile,
            self.windows,
            kind=self.settings.refit,
            held_out=self.check,
            batch_size=self.batch_size,
            progress=self.steps.go_on("refitting"),
        )

    def _measure_baseline(self) -> None:
        self.steps.begin("perplexity of the model")
        self._baselines = [self._loss(text, "perplexity of the model") for text in self._texts]
        if not all(loss.finite for loss in self._baselines):
            raise not_finite(self.model, "the loss of this model on held-out text")

    def _rises(self, profile: ClusterProfile, what: str) -> list[PairedRise]:
        """What a profile costs on the windows, and on the longer ones."""
        with enabled(self.model, profile):
            return [
                paired_rise(baseline, self._loss(text, what))
                for baseline, text in zip(self._baselines, self._texts, strict=True)
            ]

    def _loss(self, text: Tensor, what: str) -> Loss:
        assert self.check is not None
        # as many tokens at a time
        batch = max(1, self.batch_size * self.check.shape[1] // text.shape[1])
        return token_loss(self.model, text, batch_size=batch, progress=self.steps.go_on(what))
