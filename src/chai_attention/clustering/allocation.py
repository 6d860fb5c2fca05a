"""How many clusters each layer gets, when the layers share one budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Allocation:
    """The cheapest way to remove any number of units, by dynamic programming on additive costs.

    A unit is a head, or a K/V head where whole K/V heads are chosen. Layers' costs must be
    comparable: gradient costs are, distances of maps or outputs are not (see `EqualError`).

    Args:
        costs: per layer, the cost of removing 0, 1, 2, ... units. A layer that must keep all its
            heads has one entry.
    """

    def __init__(self, costs: Sequence[Sequence[float]]):
        best = np.zeros(1)  # cheapest cost of removing n units from the layers so far
        self._choices: list[np.ndarray] = []
        for curve in costs:
            steps = np.asarray(curve, dtype=float)
            size = len(best) + len(steps) - 1
            table = np.full((len(steps), size), np.inf)
            for removed, cost in enumerate(steps):
                table[removed, removed : removed + len(best)] = best + cost
            # of equal costs the one that takes least from this layer
            self._choices.append(table.argmin(0))
            best = table.min(0)
        self.costs = best

    @property
    def most(self) -> int:
        """Units that can be removed in all."""
        return len(self.costs) - 1

    def removed(self, units: int) -> list[int]:
        """Units to remove from each layer so that ``units`` are removed in all."""
        if not 0 <= units <= self.most:
            raise ValueError(f"0 to {self.most} units can be removed, not {units}")
        per_layer = []
        for choice in reversed(self._choices):
            per_layer.append(int(choice[units]))
            units -= per_layer[-1]
        return per_layer[::-1]


class EqualError:
    """Removes units so that no layer's relative error is larger than it has to be.

    For costs that cannot be added over layers: the paper's elbow, too, compares each layer with
    itself only. Units are removed one at a time, from the layer whose error stays lowest.

    Args:
        errors: per layer, the relative error after removing 0, 1, 2, ... units; never falls.
    """

    def __init__(self, errors: Sequence[Sequence[float]]):
        self._order = sorted(
            (error, layer, removed)
            for layer, curve in enumerate(errors)
            for removed, error in enumerate(curve)
            if removed
        )
        self._layers = len(errors)

    @property
    def most(self) -> int:
        """Units that can be removed in all."""
        return len(self._order)

    def removed(self, units: int) -> list[int]:
        """Units to remove from each layer so that ``units`` are removed in all."""
        if not 0 <= units <= self.most:
            raise ValueError(f"0 to {self.most} units can be removed, not {units}")
        per_layer = [0] * self._layers
        for _, layer, _ in self._order[:units]:
            per_layer[layer] += 1
        return per_layer
