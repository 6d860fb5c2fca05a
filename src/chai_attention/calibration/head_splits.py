"""From costs to the kind of every head (keep, share, stream), for any number of saved bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from chai_attention.calibration.evidence import Evidence
from chai_attention.clustering.allocation import Allocation
from chai_attention.clustering.split import Split, best_splits
from chai_attention.errors import CalibrationError
from chai_attention.runtime.shape import ModelShape


@dataclass(eq=False)
class HeadSplits:
    """The cheapest ways to keep, share and stream heads with one exact recent window.

    A unit is K or V of far keys of one K/V head on each rank: all units are of one size, so that
    a number of units is a number of bytes. Within a layer splits are optimal as `best_splits`
    says, over layers by dynamic programming.

    Attributes:
        shape: of the model.
        evidence: gradient costs, which add up over layers, with this window.
        recent: w, at least 1.
        sinks: s.
        share: whether heads may use each other's scores of far keys.
        ranks: that hold different K/V heads, and share and save by themselves (see `best_splits`).
    """

    shape: ModelShape
    evidence: Evidence
    recent: int
    sinks: int
    share: bool = True
    ranks: int = 1

    @cached_property
    def layers(self) -> list[list[Split]]:
        """Per layer, the best split for 0, 1, 2, ... saved units."""
        shape, evidence = self.shape, self.evidence
        assert evidence.costs is not None
        assert evidence.streaming is not None
        return [
            _splits(
                costs.double().numpy().tobytes() if self.share and free else None,
                streaming.double().numpy().tobytes() if free else None,
                shape.kv_heads,
                shape.heads,
                self.ranks,
            )
            for costs, streaming, free in zip(
                evidence.costs, evidence.streaming, shape.clusterable, strict=True
            )
        ]

    @cached_property
    def _plan(self) -> Allocation:
        return Allocation([[split.cost for split in layer] for layer in self.layers])

    @property
    def units(self) -> int:
        """Units of the whole model."""
        return 2 * self.shape.layers * self.shape.kv_heads // self.ranks

    @property
    def most(self) -> int:
        """Units that can be saved."""
        return self._plan.most

    def at(self, units: int) -> list[Split]:
        """Return what every layer does so that at least ``units`` are saved at the lowest cost.

        Raises:
            ValueError: more units than can be saved.
        """
        if 0 <= units <= self.most:  # what costs no more is saved with them
            units = int(np.searchsorted(self._plan.costs, self._plan.costs[units], "right")) - 1
        removed = self._plan.removed(units)
        return [layer[n] for layer, n in zip(self.layers, removed, strict=True)]

    def cost(self, units: int) -> float:
        """Cost of `at`, summed over heads and layers."""
        return float(self._plan.costs[units])

    def rise(self, units: int) -> float:
        """Relative rise of perplexity that the costs of `at` predict: half their sum, in nats."""
        return predicted_rise(self._plan.costs[units])

    def unit_share(self, tokens: int) -> float:
        """Share of the K,V bytes of ``tokens`` tokens that one unit saves, its ring taken off.

        A layer with a sliding window holds no more tokens than that.
        """
        shape = self.shape
        sliding = min(1.0, (shape.sliding_window or tokens) / tokens)
        layers = sum(1.0 if free else sliding for free in shape.clusterable)
        units = 2 * shape.kv_heads // self.ranks * layers
        return (1 - min(1.0, (self.recent + self.sinks) / tokens)) / units

    def saved(self, splits: list[Split], tokens: int) -> float:
        """Share of the K,V bytes of ``tokens`` tokens that these splits of all layers save."""
        return sum(split.saved for split in splits) * self.unit_share(tokens)

    def units_to_save(self, share: float, tokens: int) -> int | None:
        """Fewest units that save ``share`` of the K,V bytes of ``tokens`` tokens.

        None if all that can be saved is less.
        """
        each = self.unit_share(tokens)
        if self.most * each < share * (1 - 1e-9):
            return None
        return min(self.most, math.ceil(share / each * (1 - 1e-9)))

    def units_within(self, max_loss: float) -> int:
        """Most units whose predicted rise of perplexity is at most ``max_loss``."""
        costs = self._plan.costs
        return int(np.searchsorted(costs, 2 * math.log1p(max_loss) * (1 + 1e-12), "right")) - 1


def predicted_rise(cost: float) -> float:
    """Relative rise of perplexity that gradient costs, summed over heads and layers, predict."""
    return math.expm1(cost / 2)


@lru_cache(maxsize=4096)
def _splits(
    sharing: bytes | None, streaming: bytes | None, kv_heads: int, heads: int, ranks: int
) -> list[Split]:
    """`best_splits`, remembered: a frontier asks for them once a budget, of the same costs."""
    parts = (
        None if x is None else torch.frombuffer(bytearray(x), dtype=torch.float64)
        for x in (sharing, streaming)
    )
    share, stream = next(parts), next(parts)
    share = None if share is None else share.view(heads, heads)
    return best_splits(share, stream, kv_heads, heads, ranks)


def best_recent(
    splits: Mapping[int, HeadSplits],
    tokens: int,
    *,
    save: float | None = None,
    max_loss: float | None = None,
) -> int:
    """Return the w that serves best at ``tokens`` tokens of context, by what costs predict.

    A wide window loses less with every head, and saves less: its rings hold more.

    Args:
        splits: by w.
        tokens: length of the context that bytes are counted for.
        save: share of its K,V bytes not to keep: the w of the lowest cost wins.
        max_loss: relative rise of perplexity: the w that saves most wins.

    Raises:
        CalibrationError: no window can save as much.
        ValueError: not exactly one of ``save`` and ``max_loss``.
    """
    if (save is None) == (max_loss is None):
        raise ValueError("the best window is told by either a saving or a loss")
    ordered = sorted(splits)
    if max_loss is not None:
        saved = [splits[w].units_within(max_loss) * splits[w].unit_share(tokens) for w in ordered]
        return ordered[int(np.argmax(saved))]
    assert save is not None
    rises = []
    for w in ordered:
        units = splits[w].units_to_save(save, tokens)
        rises.append(math.inf if units is None else splits[w].rise(units))
    if not math.isfinite(min(rises)):
        most = max(splits[w].most * splits[w].unit_share(tokens) for w in ordered)
        raise CalibrationError(
            f"save {save:.1%} of the K,V bytes of {tokens} tokens is more than this model can: "
            f"{most:.1%} with an exact window of {ordered[0]} tokens; name a longer context or "
            "save less"
        )
    return ordered[int(np.argmin(rises))]
