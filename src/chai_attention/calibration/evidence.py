"""Evidence: what a calibration measures of a model on text, independent of the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.checks import not_finite, require_finite
from chai_attention.calibration.costs import (
    GRADIENT,
    SCORES,
    Costs,
    ExactWindow,
    OffsetStatistics,
    collect_costs,
    empty_sums,
)
from chai_attention.calibration.evidence_file import EvidenceFile
from chai_attention.calibration.recall import RecallSequences
from chai_attention.calibration.settings import Resolved
from chai_attention.calibration.sizes import BATCH_SIZE
from chai_attention.calibration.statistics import GramStatistics, observe
from chai_attention.calibration.steps import Steps
from chai_attention.progress import Report, quiet
from chai_attention.results import digest
from chai_attention.runtime.shape import describe

MAPS = "attention maps"
RECALL_COSTS = "gradient costs of recalling facts"


@dataclass(frozen=True)
class Evidence:
    """Sums over sample text, of heads and of every pair of them.

    Attributes:
        grams: ``[L, H, H]`` float64, inner products of the heads' attention maps.
        costs: ``[L, H, H]`` float64, what head h (row) pays for r's scores; None where the
            distance of maps is the cost. With text to recall from, what the text says plus what
            recalling says, weighted (`Costs.plus`).
        offsets: ``[L, H, H]`` float32 of an exact recent window, else None.
        streaming: ``[L, H]`` float64, what head h pays for seeing local keys only; None without
            costs or without an exact recent window.
    """

    grams: Tensor
    costs: Tensor | None
    offsets: Tensor | None
    streaming: Tensor | None = None


@dataclass(eq=False)
class EvidenceStore:
    """Evidence of one model from the same sequences, collected once for all recipes that use it.

    Attributes:
        model: without clustered heads.
        sequences: ``[N, S]`` tokens.
        batch_size: sequences per forward.
        file: keeps sums on disk, and gives those of an interrupted calibration back.
    """

    model: PreTrainedModel
    sequences: Tensor
    batch_size: int = BATCH_SIZE
    file: EvidenceFile | None = None
    _grams: Tensor | None = None
    _offsets: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _costs: dict[tuple[str, int, int], Costs] = field(default_factory=dict)
    _recall: RecallSequences | None = None

    def use_recall(self, recall: RecallSequences | None) -> None:
        """Take sequences to recall from into account, where settings give them a weight.

        What is known of others is forgotten.
        """
        before = self._recall
        if recall is None or before is None or not torch.equal(recall.tokens, before.tokens):
            self._costs = {
                key: costs for key, costs in self._costs.items() if key[0] != RECALL_COSTS
            }
        self._recall = recall

    def missing(self, settings: Resolved, recents: Sequence[int] | None = None) -> list[str]:
        """Name the passes over the text that `get_all` needs and that were not made yet."""
        exact = self._exact_windows(settings, recents)
        passes = [MAPS] if self._grams is None or self._without_offsets(exact) else []
        return passes + [what for what in self._kinds(settings) if self._without(what, exact)]

    def get(self, settings: Resolved, steps: Steps | None = None) -> Evidence:
        """Return what settings with a single exact window need, as `get_all`."""
        ((_, found),) = self.get_all(settings, steps=steps).items()
        return found

    def get_all(
        self,
        settings: Resolved,
        recents: Sequence[int] | None = None,
        steps: Steps | None = None,
    ) -> dict[int, Evidence]:
        """Return what ``settings`` need with each exact window, by w.

        What is not there yet is collected for all of them at once, in one forward and, with
        costs, one more forward (and backward) per sequence.

        Args:
            settings: of the calibration; its sinks are those of all exact windows.
            recents: every w, at least 1; None for those that ``settings`` try.
            steps: told of each pass.

        Raises:
            CalibrationError: the model's loss is no number, or it has no gradients.
        """
        exact, missing = self._exact_windows(settings, recents), self.missing(settings, recents)
        steps = steps or Steps(quiet, len(missing))
        if missing:
            require_finite(self.model, self.sequences[:1])
        for what in missing:
            if what == MAPS:
                self._observe(self._without_offsets(exact), steps.begin(what))
            else:
                self._collect(what, self._without(what, exact), steps.begin(what))
        assert self._grams is not None
        found = {}
        for window in exact:
            costs, recall = (
                [self._costs[what, *window] for what in self._kinds(settings)] + [None, None]
            )[:2]
            if costs is not None and recall is not None:
                costs = costs.plus(recall, settings.recall)
            found[window[0]] = Evidence(
                self._grams,
                None if costs is None else costs.sharing,
                self._offsets.get(window),
                None if costs is None else costs.streaming,
            )
        return found

    def _exact_windows(
        self, settings: Resolved, recents: Sequence[int] | None
    ) -> list[tuple[int, int]]:
        """Every exact window, w and s."""
        recents = settings.recents(self.sequences.shape[1]) if recents is None else recents
        return [(recent, settings.sinks) for recent in dict.fromkeys(recents)]

    def _kinds(self, settings: Resolved) -> list[str]:
        """The passes that find the costs of these settings: of the text, and of recalling."""
        if settings.cost == SCORES:
            return []
        recalls = settings.recall and settings.cost == GRADIENT and self._recall is not None
        return [f"{settings.cost} costs", *([RECALL_COSTS] if recalls else [])]

    def _without_offsets(self, exact: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [window for window in exact if window[0] and window not in self._offsets]

    def _without(self, what: str, exact: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [window for window in exact if (what, *window) not in self._costs]

    def _observe(self, exact: Sequence[tuple[int, int]], report: Report) -> None:
        """Collect maps, if they are missing, and offsets of these exact windows, in one pass."""
        shape = describe(self.model)
        found: list[GramStatistics | OffsetStatistics] = []
        if self._grams is None:
            found.append(GramStatistics(shape.layers, shape.heads))
        if exact:
            windows = [ExactWindow(*window) for window in exact]
            found.append(OffsetStatistics(shape.layers, shape.heads, windows))
        sums = {name: tensor for one in found for name, tensor in one.sums.items()}
        start, keep = self._kept(f"maps {exact}", sums, self.sequences)
        observe(
            self.model,
            self.sequences,
            [statistics.add for statistics in found],
            batch_size=self.batch_size,
            start=start,
            progress=_both(keep, report),
        )
        if not all(tensor.isfinite().all() for tensor in sums.values()):
            raise not_finite(self.model, "an attention map of this model")
        for one in found:
            if isinstance(one, GramStatistics):
                self._grams = one.grams
            else:
                self._offsets |= dict(zip(exact, one.offsets, strict=True))

    def _collect(self, what: str, exact: Sequence[tuple[int, int]], report: Report) -> None:
        """Collect costs of these exact windows, in one pass."""
        kind, tokens, counted = what.split()[0], self.sequences, None
        if what == RECALL_COSTS:
            assert self._recall is not None
            tokens, counted = self._recall.tokens, self._recall.counted
        shape = describe(self.model)
        sums = empty_sums(len(exact), shape.layers, shape.heads)
        start, keep = self._kept(f"{kind} {exact}", {"costs": sums}, tokens, counted)
        found = collect_costs(
            self.model,
            tokens,
            kind,
            exact=[ExactWindow(*window, self._offsets.get(window)) for window in exact],
            counted=counted,
            batch_size=max(1, self.batch_size // 2),
            sums=sums,
            start=start,
            progress=_both(keep, report),
        )
        self._costs |= {(what, *window): costs for window, costs in zip(exact, found, strict=True)}

    def _kept(
        self,
        name: str,
        sums: Mapping[str, Tensor],
        tokens: Tensor,
        counted: Tensor | None = None,
    ) -> tuple[int, Report]:
        """Give the sums what a file holds of them: sequences done, and what keeps them from now."""
        file = self.file
        if file is None:
            return 0, lambda done, total: None
        name = f"{name} {digest(tokens, *([] if counted is None else [counted]))}"
        return file.restore(name, sums), lambda done, total: file.keep(name, sums, done)


def _both(first: Report, second: Report) -> Report:
    def report(done: int, total: int) -> None:
        first(done, total)
        second(done, total)

    return report
