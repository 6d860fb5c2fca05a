"""From evidence to profiles: one for every number of heads that could be removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from chai_attention.calibration.costs import GRADIENT
from chai_attention.calibration.evidence import Evidence
from chai_attention.calibration.head_splits import predicted_rise
from chai_attention.calibration.settings import Resolved
from chai_attention.calibration.statistics import cosine_similarity, rounded
from chai_attention.clustering.allocation import Allocation, EqualError
from chai_attention.clustering.assign import K_BYTES, assign, on_ranks
from chai_attention.clustering.elbow import elbow, error_curve
from chai_attention.clustering.exact import best_assignment
from chai_attention.errors import CalibrationError
from chai_attention.profile import BLEND, FOR_EVER, STATIC, ClusterProfile
from chai_attention.runtime.shape import ModelShape


@dataclass(eq=False)
class Candidates:
    """Profiles of one model, recipe and text, by the number of units removed.

    A unit is a head, or a K/V head with target "k-bytes"; on each rank, if the profile is to be
    served on several.

    Attributes:
        shape: of the model.
        settings: of the calibration.
        evidence: of the text.
        provenance: what every profile remembers of its making.
    """

    shape: ModelShape
    settings: Resolved
    evidence: Evidence
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> list[int]:
        """Numbers of clusters a layer can have, ascending."""
        return self.settings.layer_counts(self.shape)

    @cached_property
    def curves(self) -> list[list[float]]:
        """Per layer, the summed cost for every entry of ``counts``, relative to the first."""
        if self.evidence.costs is None:
            return [
                error_curve(gram, self.shape.kv_heads, self.settings.target, self._ranks)
                for gram in self.evidence.grams
            ]
        return [
            [cost / curve[0] if curve[0] > 0 else 0.0 for cost in curve] for curve in self._costs
        ]

    @cached_property
    def _assignments(self) -> list[list[Tensor]]:
        """Per layer and entry of ``counts``, the best membership ``[H]`` by the costs."""
        assert self.evidence.costs is not None
        return [
            [self._on_ranks(cost, k, best_assignment) for k in self.counts]
            for cost in self.evidence.costs
        ]

    def _on_ranks(
        self, table: Tensor, k: int, choose: Callable[[Tensor, int, int, str], Tensor]
    ) -> Tensor:
        """A membership ``[H]`` of k clusters, of which every rank chooses its own."""
        ranks, target = self._ranks, self.settings.target
        own = k // ranks, self.shape.kv_heads // ranks, target
        return on_ranks(table, ranks, lambda part: choose(part, *own))

    @cached_property
    def _costs(self) -> list[list[float]]:
        """Per layer and entry of ``counts``, the summed cost; never rises."""
        assert self.evidence.costs is not None
        curves = []
        for cost, assignments in zip(self.evidence.costs, self._assignments, strict=True):
            curve: list[float] = []
            for rep in assignments:
                total = cost.gather(1, rep[:, None]).sum().item()
                curve.append(min([total, *curve[-1:]]))
            curves.append(curve)
        return curves

    @property
    def _ranks(self) -> int:
        """Ranks whose heads share among themselves."""
        return self.settings.tensor_parallel

    @cached_property
    def _plan(self) -> Allocation | EqualError:
        """Who gives up units first: gradient costs add up over layers, others do not."""
        absolute = self.settings.cost == GRADIENT
        curves = self._costs if absolute else self.curves
        free = [
            curve[::-1] if free else curve[-1:]
            for curve, free in zip(curves, self.shape.clusterable, strict=True)
        ]
        return Allocation(free) if absolute else EqualError(free)

    @property
    def most(self) -> int:
        """Units that can be removed."""
        return self._plan.most

    @property
    def units(self) -> int:
        """Units of the whole model."""
        return self.shape.layers * len(self.counts)

    @property
    def unit(self) -> str:
        """What a unit is called."""
        several = " of each rank" if self._ranks > 1 else ""
        return ("K/V heads" if self.settings.target == K_BYTES else "heads") + several

    @property
    def resolution(self) -> int:
        """The search for the largest saving goes down to single units."""
        return 1

    def units_asked(self) -> int:
        """Units that do what the budget asks, a saving or a share of the heads.

        Raises:
            CalibrationError: more than this model can.
        """
        save, removed = self.settings.save, self.settings.removed
        # a unit of the layers whose K,V bytes grow with every token is K, which is half of them
        growing = 2 * (save or 0.0) * sum(self.shape.clusterable) * len(self.counts)
        exact = growing if removed is None else removed * self.units
        units = min(self.most, max(1, int(exact) + (exact > int(exact) + 1e-9)))
        if units == self.most < growing:
            most = self.remove(units).saved(self.shape, FOR_EVER)
            raise CalibrationError(
                f"save {save:.1%} is more than this model can: K of all but one head "
                f"a layer is {most:.1%} of its K,V bytes"
            )
        return units

    @property
    def guess(self) -> int:
        """Units that the search for the largest saving begins with."""
        return self.units // 20

    def remove(self, units: int) -> ClusterProfile:
        """Return the profile with ``units`` units removed where they cost least."""
        removed = self._plan.removed(units)
        return self.profile([self.counts[len(self.counts) - 1 - n] for n in removed])

    def at_elbow(self, max_error: float) -> ClusterProfile:
        """Return the profile at every layer's elbow (CHAI, 3.2)."""
        return self.profile(
            [
                elbow(self.counts, curve, max_error) if free else self.shape.heads
                for free, curve in zip(self.shape.clusterable, self.curves, strict=True)
            ]
        )

    def profile(self, clusters: list[int]) -> ClusterProfile:
        """Return the profile with these numbers of clusters."""
        settings, evidence = self.settings, self.evidence
        return ClusterProfile(
            clusters=tuple(clusters),
            membership=settings.membership,
            window=settings.window,
            target=settings.target,
            representatives=(self._static(clusters) if settings.membership == STATIC else None),
            probe_start=settings.probe_start,
            features=settings.features,
            blend=settings.blend,
            costs=rounded(evidence.costs, 5) if settings.membership == BLEND else None,
            recent=int(settings.recent or 0),
            sinks=settings.sinks,
            offsets=rounded(evidence.offsets, 4),
            tensor_parallel=self._ranks,
            provenance={**self.provenance, **self._predicted(clusters)},
            **self._facts,
        )

    def _predicted(self, clusters: list[int]) -> dict[str, Any]:
        """What costs predict of these clusters on several ranks, and of as many heads on one."""
        if self._ranks == 1 or self.settings.cost != GRADIENT:
            return {}
        chosen, one = (c._chosen_cost(clusters) for c in (self, self._one_rank))
        return predictions(chosen, one)

    def _chosen_cost(self, clusters: list[int]) -> float:
        """The cost of these clusters, or where a budget is dealt out, of the best of as many."""
        if self.settings.budgeted:
            freed = sum(self.shape.heads - k for k in clusters)
            assert isinstance(self._plan, Allocation)
            return float(self._plan.costs[freed * len(self.counts) // self.shape.heads])
        index = [self.counts.index(k) for k in clusters]
        return sum(curve[i] for curve, i in zip(self._costs, index, strict=True))

    @cached_property
    def _one_rank(self) -> Candidates:
        """The candidates if no rank were to be heeded."""
        return Candidates(self.shape, replace(self.settings, tensor_parallel=1), self.evidence)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return facts_of(self.shape, self.evidence.grams, self.curves)

    def _static(self, clusters: list[int]) -> tuple[tuple[int, ...], ...]:
        """Memberships for these numbers of clusters, per layer."""
        if self.evidence.costs is not None:
            index = [self.counts.index(k) for k in clusters]
            found = [layer[i] for layer, i in zip(self._assignments, index, strict=True)]
        else:
            found = [
                self._on_ranks(gram, k, lambda part, *own: assign(part[None], *own)[0])
                for gram, k in zip(self.evidence.grams, clusters, strict=True)
            ]
        return tuple(tuple(rep.tolist()) for rep in found)


def predictions(cost: float, one_rank: float) -> dict[str, float]:
    """What a profile for several ranks says of the costs of its heads.

    Args:
        cost: gradient costs, summed.
        one_rank: those of as many saved bytes if no rank were to be heeded.
    """
    found = {"predicted_rise": cost, "predicted_rise_one_rank": one_rank}
    return {name: round(predicted_rise(each), 6) for name, each in found.items()}


def facts_of(shape: ModelShape, grams: Tensor, curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What every profile of a model and text says, whatever it removes.

    Args:
        shape: of the model.
        grams: ``[L, H, H]``, inner products of the heads' attention maps.
        curves: per layer, the relative clustering error (`ClusterProfile.error`).
    """
    names = ("architecture", "layers", "heads", "kv_heads", "head_dim")
    return {
        "model": {name: getattr(shape, name) for name in names},
        "error": tuple(tuple(round(error, 6) for error in curve) for curve in curves),
        "similarity": tuple(
            tuple(tuple(round(s, 3) for s in row) for row in layer)
            for layer in cosine_similarity(grams).tolist()
        ),
    }
