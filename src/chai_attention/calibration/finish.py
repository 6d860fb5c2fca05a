"""From candidates to the profile that is written: refit, measured, searched."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.budget import largest_within
from chai_attention.calibration.candidates import Candidates, units_name
from chai_attention.calibration.checks import not_finite
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.steps import Steps
from chai_attention.errors import CalibrationError
from chai_attention.evaluation.perplexity import Loss, PairedRise, paired_rise, token_loss
from chai_attention.integrations.transformers.enable import enabled
from chai_attention.integrations.transformers.support import describe
from chai_attention.profile import ClusterProfile

FOR_EVER = 10**9  # tokens of a context in which a recent window counts for nothing


class Finish:
    """Refits and measures profiles, on the windows kept back for that.

    Args:
        model: without clustered heads.
        settings: resolved.
        windows: ``[N, S]`` tokens that were learnt from.
        check: ``[M, S]`` tokens to measure on; None if nothing is measured.
        batch_size: windows per forward.
        steps: what is told how far it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        windows: Tensor,
        check: Tensor | None,
        batch_size: int,
        steps: Steps,
    ):
        self.model = model
        self.settings = settings
        self.windows = windows
        self.check = check
        self.batch_size = batch_size
        self.steps = steps
        self._baseline: Loss | None = None

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
        rise = self._rise(profile, "perplexity with clusters")
        if not math.isfinite(rise.rise):
            raise not_finite(self.model, "the loss with what was asked for removed")
        return self._promise(profile, asked, rise, 1)

    def within_loss(self, candidates: Candidates) -> ClusterProfile:
        """Return the profile that removes most within the loss asked for.

        Raises:
            CalibrationError: not even the cheapest unit keeps to it.
        """
        max_loss = self.settings.max_loss
        assert max_loss is not None
        assert self.check is not None
        profiles: dict[int, ClusterProfile] = {}
        unit = units_name(candidates.target)
        self._measure_baseline()

        def measure(units: int) -> PairedRise:
            what = f"perplexity without {units} {unit}"
            self.steps.begin("refitting" if self.refits else what)
            profiles[units] = self._refit(candidates.remove(units))
            return self._rise(profiles[units], what)

        kept = largest_within(measure, candidates.most, max_loss, candidates.guess)
        if kept.units == 0:
            if not math.isfinite(kept.rise.rise):
                raise not_finite(self.model, f"the loss without the cheapest of all {unit}")
            raise CalibrationError(
                f"max_loss {max_loss:.2%} cannot be met: already the cheapest of all {unit} costs "
                f"{kept.rise} perplexity on {len(self.check)} held-out windows. Ask for more, or "
                "measure on more text (the standard error counts 1.6 times)"
            )
        return self._promise(profiles[kept.units], {"max_loss": max_loss}, kept.rise, kept.tried)

    def _promise(
        self, profile: ClusterProfile, asked: dict[str, Any], rise: PairedRise, tried: int
    ) -> ClusterProfile:
        assert self.check is not None
        shape, length = describe(self.model), self.check.shape[1]
        return replace(
            profile,
            promise={
                **asked,
                "rise": round(rise.rise, 6),
                "standard_error": round(rise.standard_error, 6),
                "windows": len(self.check),
                "length": length,
                "saved": round(profile.saved(shape, length), 6),
                "saved_per_token": round(profile.saved(shape, FOR_EVER), 6),
                "profiles_tried": tried,
            },
        )

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
        self._baseline = self._loss("perplexity of the model")
        if not self._baseline.finite:
            raise not_finite(self.model, "the loss of this model on held-out text")

    def _rise(self, profile: ClusterProfile, what: str) -> PairedRise:
        assert self._baseline is not None
        with enabled(self.model, profile):
            return paired_rise(self._baseline, self._loss(what))

    def _loss(self, what: str) -> Loss:
        assert self.check is not None
        return token_loss(
            self.model, self.check, batch_size=self.batch_size, progress=self.steps.go_on(what)
        )
