"""What a calibration learns from text about a model, whatever budget it is then used for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.checks import not_finite, require_finite
from chai_attention.calibration.costs import (
    GRADIENT,
    SCORES,
    Costs,
    Near,
    OffsetStatistics,
    collect_costs,
    empty_sums,
)
from chai_attention.calibration.evidence_file import EvidenceFile
from chai_attention.calibration.recall import RecallWindows
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.statistics import GramStatistics, observe
from chai_attention.calibration.steps import Steps
from chai_attention.progress import quiet
from chai_attention.results import digest
from chai_attention.runtime.shape import describe

Report = Callable[[int, int], None]
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
        streaming: ``[L, H]`` float64, what head h pays for seeing near keys only; None without
            costs or without an exact recent window.
    """

    grams: Tensor
    costs: Tensor | None
    offsets: Tensor | None
    streaming: Tensor | None = None


class EvidenceStore:
    """Evidence of one model from the same windows, collected once for all recipes that use it.

    Args:
        model: without clustered heads.
        windows: ``[N, S]`` tokens.
        batch_size: windows per forward.
        file: keeps sums on disk, and gives those of an interrupted calibration back.
        counted: ``[N, S]`` bool, tokens whose loss counts in gradient costs, such as the answers
            of `calibration.recall`; None for all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        batch_size: int = 8,
        file: EvidenceFile | None = None,
        counted: Tensor | None = None,
    ):
        self.model = model
        self.windows = windows
        self.batch_size = batch_size
        self.counted = counted
        self._file = file
        self._grams: Tensor | None = None
        self._offsets: dict[tuple[int, int], Tensor] = {}
        self._costs: dict[tuple[str, int, int], Costs] = {}
        self._recall: RecallWindows | None = None
        self._recall_costs: dict[tuple[int, int], Costs] = {}

    def use_recall(self, recall: RecallWindows | None) -> None:
        """Take windows of text to recall from into account, where settings give them a weight.

        What is known of others is forgotten.
        """
        before = self._recall
        if recall is None or before is None or not torch.equal(recall.tokens, before.tokens):
            self._recall_costs = {}
        self._recall = recall

    def missing(self, settings: Settings, recents: Sequence[int] | None = None) -> list[str]:
        """Name the passes over the text that ``settings`` need and that were not made yet.

        With ``recents``, as `get_all` would need them.
        """
        nears = _nears(settings, recents)
        passes = []
        if self._grams is None or self._without_offsets(nears):
            passes.append("attention maps")
        if settings.cost not in (None, SCORES) and self._without_costs(settings.cost, nears):
            passes.append(f"{settings.cost} costs")
        if self._recalls(settings) and self._without_recall(nears):
            passes.append(RECALL_COSTS)
        return passes

    def get(self, settings: Settings, steps: Steps | None = None) -> Evidence:
        """Return what ``settings`` need; runs the model for what is not there yet.

        Raises:
            CalibrationError: the model's loss is no number, or it has no gradients.
        """
        ((_, found),) = self.get_all(settings, None, steps).items()
        return found

    def get_all(
        self, settings: Settings, recents: Sequence[int] | None, steps: Steps | None = None
    ) -> dict[int, Evidence]:
        """Return what ``settings`` would need with each of these recent windows, by w.

        What is not there yet is collected for all of them at once, in one forward and, with
        costs, one more forward (and backward) per window of text.

        Args:
            settings: of the calibration; its sinks are those of all windows.
            recents: every w, at least 1; None for that of ``settings``.
            steps: told of each pass.

        Raises:
            CalibrationError: as `get`.
        """
        nears, missing = _nears(settings, recents), self.missing(settings, recents)
        steps = steps or Steps(quiet, len(missing))
        if missing:
            require_finite(self.model, self.windows[:1])
        if "attention maps" in missing:
            self._observe(self._without_offsets(nears), steps.begin("attention maps"))
        kind = settings.cost
        if kind is not None and f"{kind} costs" in missing:
            report = steps.begin(f"{kind} costs")
            self._collect(kind, self._without_costs(kind, nears), report)
        if RECALL_COSTS in missing:
            self._collect_recall(self._without_recall(nears), steps.begin(RECALL_COSTS))
        assert self._grams is not None
        found = {}
        for near in nears:
            costs = None if kind is None else self._costs.get((kind, *near))
            if costs is not None and self._recalls(settings):
                assert settings.recall is not None
                costs = costs.plus(self._recall_costs[near], settings.recall)
            found[near[0]] = Evidence(
                self._grams,
                None if costs is None else costs.sharing,
                self._offsets.get(near),
                None if costs is None else costs.streaming,
            )
        return found

    def _without_offsets(self, nears: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [near for near in nears if near[0] and near not in self._offsets]

    def _without_costs(
        self, kind: str | None, nears: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        return [near for near in nears if (kind, *near) not in self._costs]

    def _recalls(self, settings: Settings) -> bool:
        return bool(settings.recall) and settings.cost == GRADIENT and self._recall is not None

    def _without_recall(self, nears: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [near for near in nears if near not in self._recall_costs]

    def _observe(self, nears: Sequence[tuple[int, int]], report: Report) -> None:
        """Collect maps, if they are missing, and offsets of these windows, in one pass."""
        shape = describe(self.model)
        grams = GramStatistics(shape.layers, shape.heads) if self._grams is None else None
        offsets = None
        if nears:
            windows = [Near(*near) for near in nears]
            offsets = OffsetStatistics(shape.layers, shape.heads, windows)
        sums = {} if grams is None else {"grams": grams.grams}
        sums |= {} if offsets is None else offsets.sums
        start, keep = self._kept(f"maps {nears}", sums, self.windows)
        observe(
            self.model,
            self.windows,
            [statistics.add for statistics in (grams, offsets) if statistics is not None],
            batch_size=self.batch_size,
            start=start,
            progress=_both(keep, report),
        )
        if not all(tensor.isfinite().all() for tensor in sums.values()):
            raise not_finite(self.model, "an attention map of this model")
        if grams is not None:
            self._grams = grams.grams
        if offsets is not None:
            self._offsets |= dict(zip(nears, offsets.offsets, strict=True))

    def _collect(self, kind: str, nears: Sequence[tuple[int, int]], report: Report) -> None:
        """Collect costs of these exact windows, in one pass."""
        counted = self.counted if kind == GRADIENT else None
        found = self._costs_of(kind, self.windows, counted, nears, report)
        self._costs |= {(kind, *near): costs for near, costs in zip(nears, found, strict=True)}

    def _collect_recall(self, nears: Sequence[tuple[int, int]], report: Report) -> None:
        """Collect what recalling says of these exact windows, in one pass."""
        assert self._recall is not None
        tokens, counted = self._recall.tokens, self._recall.counted
        found = self._costs_of(GRADIENT, tokens, counted, nears, report)
        self._recall_costs |= dict(zip(nears, found, strict=True))

    def _costs_of(
        self,
        kind: str,
        windows: Tensor,
        counted: Tensor | None,
        nears: Sequence[tuple[int, int]],
        report: Report,
    ) -> list[Costs]:
        shape = describe(self.model)
        sums = empty_sums(len(nears), shape.layers, shape.heads)
        start, keep = self._kept(f"{kind} {nears}", {"costs": sums}, windows, counted)
        return collect_costs(
            self.model,
            windows,
            kind,
            nears=[Near(*near, self._offsets.get(near)) for near in nears],
            counted=counted,
            batch_size=max(1, self.batch_size // 2),
            sums=sums,
            start=start,
            progress=_both(keep, report),
        )

    def _kept(
        self,
        name: str,
        sums: Mapping[str, Tensor],
        windows: Tensor,
        counted: Tensor | None = None,
    ) -> tuple[int, Report]:
        """Give the sums what a file holds of them: windows done, and what keeps them from now."""
        file = self._file
        if file is None:
            return 0, lambda done, total: None
        name = f"{name} {digest(windows, *([] if counted is None else [counted]))}"
        return file.restore(name, sums), lambda done, total: file.keep(name, sums, done)


def _nears(settings: Settings, recents: Sequence[int] | None) -> list[tuple[int, int]]:
    assert settings.sinks is not None
    if recents is None:
        assert isinstance(settings.recent, int)
        recents = [settings.recent]
    return [(recent, settings.sinks) for recent in dict.fromkeys(recents)]


def _both(first: Report, second: Report) -> Report:
    def report(done: int, total: int) -> None:
        first(done, total)
        second(done, total)

    return report
