"""What a calibration learns from text about a model, whatever budget it is then used for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.checks import not_finite, require_finite
from chai_attention.calibration.costs import SCORES, Near, OffsetStatistics, collect_costs
from chai_attention.calibration.evidence_file import EvidenceFile
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.statistics import GramStatistics, observe
from chai_attention.calibration.steps import Steps
from chai_attention.integrations.transformers.support import describe
from chai_attention.progress import quiet

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Evidence:
    """Sums over sample text, of every pair of heads.

    Attributes:
        grams: ``[L, H, H]`` float64, inner products of the heads' attention maps.
        costs: ``[L, H, H]`` float64, what head h (row) pays for r's scores; None where the
            distance of maps is the cost.
        offsets: ``[L, H, H]`` float32 of an exact recent window, else None.
    """

    grams: Tensor
    costs: Tensor | None
    offsets: Tensor | None


class EvidenceStore:
    """Evidence of one model from the same windows, collected once for all recipes that use it.

    Args:
        model: without clustered heads.
        windows: ``[N, S]`` tokens.
        batch_size: windows per forward.
        file: keeps sums on disk, and gives those of an interrupted calibration back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        batch_size: int = 8,
        file: EvidenceFile | None = None,
    ):
        self.model = model
        self.windows = windows
        self.batch_size = batch_size
        self._file = file
        self._grams: Tensor | None = None
        self._offsets: dict[tuple[int, int], Tensor] = {}
        self._costs: dict[tuple[str, int, int], Tensor] = {}

    def missing(self, settings: Settings) -> list[str]:
        """Name the passes over the text that ``settings`` need and that were not made yet."""
        near = _near(settings)
        passes = []
        if self._grams is None or (near[0] and near not in self._offsets):
            passes.append("attention maps")
        if settings.cost not in (None, SCORES) and (settings.cost, *near) not in self._costs:
            passes.append(f"{settings.cost} costs")
        return passes

    def get(self, settings: Settings, steps: Steps | None = None) -> Evidence:
        """Return what ``settings`` need; runs the model for what is not there yet.

        Raises:
            CalibrationError: the model's loss is no number, or it has no gradients.
        """
        near, missing = _near(settings), self.missing(settings)
        steps = steps or Steps(quiet, len(missing))
        if missing:
            require_finite(self.model, self.windows[:1])
        if "attention maps" in missing:
            self._observe(near, steps.begin("attention maps"))
        offsets = self._offsets[near] if settings.recent else None
        costs = None
        if settings.cost is not None and settings.cost != SCORES:
            key = (settings.cost, *near)
            if key not in self._costs:
                report = steps.begin(f"{settings.cost} costs")
                self._costs[key] = self._collect(settings.cost, Near(*near, offsets), report)
            costs = self._costs[key]
        assert self._grams is not None
        return Evidence(self._grams, costs, offsets)

    def _observe(self, near: tuple[int, int], report: Report) -> None:
        """Collect what is missing of maps and offsets, in one pass."""
        shape = describe(self.model)
        grams = GramStatistics(shape.layers, shape.heads) if self._grams is None else None
        offsets = None
        if near[0] and near not in self._offsets:
            offsets = OffsetStatistics(shape.layers, shape.heads, Near(*near))
        sums = {} if grams is None else {"grams": grams.grams}
        sums |= {} if offsets is None else offsets.sums
        start, keep = self._kept(f"maps {near}", sums)
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
            self._offsets[near] = offsets.offsets

    def _collect(self, cost: str, near: Near, report: Report) -> Tensor:
        shape = describe(self.model)
        sums = torch.zeros(shape.layers, shape.heads, shape.heads, dtype=torch.float64)
        start, keep = self._kept(f"{cost} {near.recent} {near.sinks}", {"costs": sums})
        return collect_costs(
            self.model,
            self.windows,
            cost,
            near=near,
            batch_size=max(1, self.batch_size // 2),
            sums=sums,
            start=start,
            progress=_both(keep, report),
        )

    def _kept(self, name: str, sums: Mapping[str, Tensor]) -> tuple[int, Report]:
        """Give the sums what a file holds of them: windows done, and what keeps them from now."""
        file = self._file
        if file is None:
            return 0, lambda done, total: None
        windows = self.windows.cpu().contiguous().numpy().tobytes()
        name = f"{name} {hashlib.sha256(windows).hexdigest()[:16]}"
        return file.restore(name, sums), lambda done, total: file.keep(name, sums, done)


def _near(settings: Settings) -> tuple[int, int]:
    assert settings.recent is not None
    assert settings.sinks is not None
    return settings.recent, settings.sinks


def _both(first: Report, second: Report) -> Report:
    def report(done: int, total: int) -> None:
        first(done, total)
        second(done, total)

    return report
