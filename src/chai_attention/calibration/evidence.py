"""What a calibration learns from text about a model, whatever budget it is then used for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.costs import SCORES, Near, OffsetStatistics, collect_costs
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.statistics import GramStatistics, observe
from chai_attention.integrations.transformers.support import describe
from chai_attention.progress import Progress, quiet


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
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, batch_size: int = 8):
        self.model = model
        self.windows = windows
        self.batch_size = batch_size
        self._grams: Tensor | None = None
        self._offsets: dict[tuple[int, int], Tensor] = {}
        self._costs: dict[tuple[str, int, int], Tensor] = {}

    def get(self, settings: Settings, progress: Progress = quiet) -> Evidence:
        """Return what ``settings`` need; runs the model for what is not there yet."""
        assert settings.recent is not None
        assert settings.sinks is not None
        near = (settings.recent, settings.sinks)
        self._observe(near, progress)
        offsets = self._offsets[near] if settings.recent else None
        costs = None
        if settings.cost is not None and settings.cost != SCORES:
            costs = self._costs_of(settings.cost, Near(*near, offsets), progress)
        assert self._grams is not None
        return Evidence(self._grams, costs, offsets)

    def _observe(self, near: tuple[int, int], progress: Progress) -> None:
        """Collect what is missing of maps and offsets, in one pass."""
        shape = describe(self.model)
        grams = GramStatistics(shape.layers, shape.heads) if self._grams is None else None
        offsets = None
        if near[0] and near not in self._offsets:
            offsets = OffsetStatistics(shape.layers, shape.heads, Near(*near))
        watchers = [statistics.add for statistics in (grams, offsets) if statistics is not None]
        if not watchers:
            return
        observe(
            self.model,
            self.windows,
            watchers,
            batch_size=self.batch_size,
            progress=lambda done, total: progress("attention maps", done, total),
        )
        if grams is not None:
            self._grams = grams.grams
        if offsets is not None:
            self._offsets[near] = offsets.offsets

    def _costs_of(self, cost: str, near: Near, progress: Progress) -> Tensor:
        key = (cost, near.recent, near.sinks)
        if key not in self._costs:
            self._costs[key] = collect_costs(
                self.model,
                self.windows,
                cost,
                near=near,
                batch_size=max(1, self.batch_size // 2),
                progress=lambda done, total: progress(f"{cost} costs", done, total),
            )
        return self._costs[key]
