"""From evidence to profiles whose heads keep, share or forget their far keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from chai_attention.calibration.candidates import Candidates, facts_of, predictions
from chai_attention.calibration.evidence import Evidence
from chai_attention.calibration.head_splits import HeadSplits, best_recent
from chai_attention.calibration.settings import STREAM, Resolved
from chai_attention.calibration.statistics import rounded
from chai_attention.clustering.elbow import error_curve
from chai_attention.clustering.split import Split
from chai_attention.errors import CalibrationError
from chai_attention.profile import STATIC, ClusterProfile
from chai_attention.ranks import distinct_ranks
from chai_attention.runtime.shape import ModelShape

USUAL_RECENT = 128  # w by which a share of the heads is turned into a share of the bytes


@dataclass(eq=False)
class SplitCandidates:
    """Profiles of one model, recipe and text, by the number of units saved.

    A unit is K or V of the far keys of one K/V head, on each rank if the profile is to be served
    on several. Of several exact windows the one is taken that costs predict to serve the budget
    best (`best_recent`).

    Attributes:
        shape: of the model.
        settings: of a recipe with streaming heads.
        evidence: of the text, by w.
        provenance: what every profile remembers of its making.
    """

    shape: ModelShape
    settings: Resolved
    evidence: Mapping[int, Evidence]
    provenance: Mapping[str, Any]

    def _splits(self, w: int, ranks: int | None = None) -> HeadSplits:
        """The splits with a window of w tokens, for the ranks of the settings or other ones."""
        settings = self.settings
        share = settings.recipe != STREAM
        if ranks is None:
            ranks = distinct_ranks(self.shape.kv_heads, settings.tensor_parallel)
        return HeadSplits(self.shape, self.evidence[w], w, settings.sinks, share, ranks=ranks)

    @property
    def unit(self) -> str:
        """What units are called."""
        several = " on each rank" if self.settings.tensor_parallel > 1 else ""
        return f"units (K or V of a K/V head{several})"

    @property
    def context(self) -> int:
        """Tokens of the context that bytes are counted for."""
        assert self.settings.context is not None
        return self.settings.context

    @cached_property
    def best(self) -> HeadSplits:
        """The splits of the window that serves the budget best."""
        settings, save = self.settings, self.settings.save
        splits = {w: self._splits(w) for w in self.evidence}
        if len(splits) == 1:
            return next(iter(splits.values()))
        if settings.removed is not None:
            usual = splits[min(splits, key=lambda w: abs(w - USUAL_RECENT))]
            save = usual.saved(usual.at(self._units_without(usual)), self.context)
        return splits[best_recent(splits, self.context, save=save, max_loss=settings.max_loss)]

    @property
    def most(self) -> int:
        """Units that can be saved."""
        return self.best.most

    @property
    def guess(self) -> int:
        """Units whose predicted loss is what may be lost."""
        max_loss = self.settings.max_loss
        return self.best.units_within(max_loss) if max_loss is not None else self.most // 2

    @property
    def resolution(self) -> int:
        """Units that are not worth another measurement: 1% of all."""
        return max(1, self.best.units // 100)

    def units_asked(self) -> int:
        """Units that do what the budget asks, a saving or a share of the heads.

        Raises:
            CalibrationError: more than this model can.
        """
        if self.settings.save is None:
            return self._units_without(self.best)
        units = self.best.units_to_save(self.settings.save, self.context)
        if units is None:
            most = self.best.saved(self.best.at(self.most), self.context)
            raise CalibrationError(
                f"save {self.settings.save:.1%} of the K,V bytes of {self.context} tokens is more "
                f"than an exact window of {self.best.recent} tokens leaves: {most:.1%}"
            )
        return units

    def _units_without(self, splits: HeadSplits) -> int:
        """Fewest units so that the share of the heads that was asked for gives up its far K."""
        assert self.settings.removed is not None
        heads = self.shape.layers * self.shape.heads
        wanted = self.settings.removed * heads * (1 - 1e-9)
        for units in range(1, splits.most + 1):
            kept = sum(_clusters(split) for split in splits.at(units))
            if heads - kept >= wanted:
                return units
        raise CalibrationError(
            f"removed {self.settings.removed:.1%} is more heads than this model can do without"
        )

    def remove(self, units: int) -> ClusterProfile:
        """Return the profile that saves at least ``units`` units where they cost least."""
        splits, best = self.best.at(units), self.best
        shares = any(_shares(split) for split in splits)
        return ClusterProfile(
            clusters=tuple(_clusters(split) for split in splits),
            membership=STATIC,
            window=self.settings.window,
            target=self.settings.target,
            representatives=tuple(split.representatives for split in splits),
            streaming=tuple(split.streaming for split in splits),
            recent=best.recent,
            sinks=best.sinks,
            offsets=rounded(best.evidence.offsets, 4) if shares else None,
            tensor_parallel=self.settings.tensor_parallel,
            provenance={**self.provenance, **self._predicted(splits)},
            **self._facts,
        )

    def _predicted(self, splits: Sequence[Split]) -> dict[str, Any]:
        """What costs predict of splits for several ranks, and of as many bytes saved on one."""
        if self.settings.tensor_parallel == 1:
            return {}
        one = self._one_rank
        units = sum(split.saved for split in splits) * self.best.ranks
        return predictions(sum(split.cost for split in splits), one.cost(units))

    @cached_property
    def _one_rank(self) -> HeadSplits:
        """The splits of the same window if no rank were to be heeded."""
        return self._splits(self.best.recent, ranks=1)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """The same for every profile: found once, not for every try of a search."""
        grams = self.best.evidence.grams
        curves = [error_curve(gram, self.shape.kv_heads, self.settings.target) for gram in grams]
        return facts_of(self.shape, grams, curves)


def candidates_of(
    shape: ModelShape,
    chosen: Resolved,
    evidence: Mapping[int, Evidence],
    provenance: Mapping[str, Any] | None = None,
) -> Candidates | SplitCandidates:
    """Profiles to choose from; evidence by w."""
    provenance = provenance or {}
    if chosen.streams:
        return SplitCandidates(shape, chosen, evidence, provenance)
    (only,) = evidence.values()
    return Candidates(shape, chosen, only, provenance)


def _clusters(split: Split) -> int:
    """Representatives that see far keys."""
    return len(set(split.representatives) - set(split.streaming))


def _shares(split: Split) -> bool:
    """Whether some head uses another's scores."""
    return any(rep != head for head, rep in enumerate(split.representatives))
