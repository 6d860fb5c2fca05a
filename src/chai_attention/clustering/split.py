"""The best split of a layer's heads into kept, shared and streaming, for every saving.

A K/V head that keeps its K saves nothing. One that gives up K saves a *unit*: each of its query
heads uses the scores of the cheapest head whose K is kept, or streams (sees near keys only) where
that costs less. One whose query heads all stream needs no V of far keys either and saves two
units. In multi-head attention every head is a K/V head of its own.

Once it is known who keeps K, the rest is a sort: `_Layer.curves`. So only that choice is searched:
all choices are tried where that is quick, else `split_program` proves the best one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from torch import Tensor

from chai_attention.clustering.split_program import Program

MAX_TRIED = 1 << 14  # up to this many choices of who keeps K are all tried


@dataclass(frozen=True)
class Split:
    """What every head of a layer does with its far keys.

    Attributes:
        representatives: H entries, the head whose scores each head uses; a streaming head's is
            itself.
        streaming: heads that see near keys only, ascending.
        saved: units, of 2 G in the layer.
        cost: summed over heads.
    """

    representatives: tuple[int, ...]
    streaming: tuple[int, ...]
    saved: int
    cost: float


def best_splits(
    sharing: Tensor | None, streaming: Tensor | None, kv_heads: int, heads: int | None = None
) -> list[Split]:
    """Return the cheapest splits that save at least 0, 1, 2, ... units, as far as it goes.

    Exact: proven by trying everything up to ``MAX_TRIED`` choices of the K/V heads that keep K,
    and where nothing is shared; else by linear and integer programs to a relative gap of 1e-6. An
    integer program that takes longer than `split_program.TIME_LIMIT` gives the best that it found.

    Args:
        sharing: ``[H, H]``, what head h (row) pays for the scores of head r (column), at least 0;
            None if no head may share.
        streaming: ``[H]``, what head h pays for seeing near keys only, at least 0; None if no
            head may stream.
        kv_heads: G.
        heads: H, where neither cost is given.

    Returns:
        The split for every number of units: up to 2 G with streaming, else G - 1 with sharing,
        else 0. Costs never fall; a split may save more than its place says.

    Raises:
        ValueError: costs that are negative or not finite, or heads that do not split over the
            K/V heads.
    """
    layer = _Layer(sharing, streaming, kv_heads, heads)
    best = _Best(layer)
    if sharing is None:  # the cheapest K/V heads stream
        order = np.argsort(layer.streamed, kind="stable")
        kept = np.ones((kv_heads + 1, kv_heads), dtype=bool)
        for count in range(kv_heads + 1):
            kept[count, order[:count]] = False
        best.add(kept)
    elif 1 << kv_heads <= MAX_TRIED:
        best.add(np.array(list(product((True, False), repeat=kv_heads))))
    else:
        best.add(_greedy(layer))
        program = Program(layer.nearest, layer.stream, layer.own)
        for units in range(1, layer.most + 1):
            known = best.costs[units:].min()
            found = program.kept(units, known)
            if found is not None:
                best.add(found[None])
    return best.splits()


class _Layer:
    """Costs of a layer, by K/V heads."""

    def __init__(
        self,
        sharing: Tensor | None,
        streaming: Tensor | None,
        kv_heads: int,
        heads: int | None,
    ):
        given = next((x for x in (sharing, streaming) if x is not None), None)
        heads = heads if given is None else len(given)
        if heads is None or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads} heads cannot be split over {kv_heads} K/V heads")
        self.heads, self.kv_heads = heads, kv_heads
        self.most = 2 * kv_heads if streaming is not None else kv_heads - 1
        if sharing is None and streaming is None:
            self.most = 0
        self.own = np.arange(heads) // (heads // kv_heads)  # K/V head of each head
        self.share = _checked(sharing, (heads, heads))
        self.stream = _checked(streaming, (heads,))
        # the cheapest head of each K/V head
        self.nearest = self.share.reshape(heads, kv_heads, -1).min(-1)
        self.streamed = self._by_group(self.stream[None])[0]  # of a whole K/V head

    def curves(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cheapest costs of saving exactly so many units, if these K/V heads keep their K.

        Args:
            kept: ``[N, G]`` bool.

        Returns:
            ``[N, 2 G + 1]`` costs, infinite where it cannot be, and ``[N, G]``: the K/V heads in
            the order in which they stream whole, those that keep K at the end.
        """
        fewest = (~kept).sum(1)  # units saved if none streams whole
        without_k = self._by_group(self._cheapest(kept))
        without_k[kept] = 0.0
        with np.errstate(invalid="ignore"):
            more = self.streamed - without_k  # what streaming whole adds; never negative
        more[np.isnan(more)] = 0.0  # neither can be
        more[kept] = np.inf
        order = np.argsort(more, axis=1, kind="stable")
        steps = np.take_along_axis(more, order, 1).cumsum(1)
        costs = np.full((len(kept), 2 * self.kv_heads + 1), np.inf)
        rows = np.arange(len(kept))
        costs[rows, fewest] = without_k.sum(1)
        for count in range(1, self.kv_heads + 1):
            able = count <= fewest
            place = fewest[able] + count
            costs[rows[able], place] = costs[rows[able], fewest[able]] + steps[able, count - 1]
        return costs, order

    def split(self, kept: np.ndarray, whole: np.ndarray, cost: float) -> Split:
        """Return the split in which ``kept [G]`` keep K and ``whole [G]`` stream whole."""
        allowed = kept[self.own]
        price = np.where(allowed, self.share, np.inf)
        nearest = price.argmin(1)
        alone = whole[self.own] | (self.stream <= price.min(1))
        streaming = alone & ~allowed
        own = np.arange(self.heads)
        rep = np.where(allowed | streaming, own, nearest)
        saved = int((~kept).sum() + streaming.reshape(self.kv_heads, -1).all(1).sum())
        return Split(tuple(rep.tolist()), tuple(own[streaming].tolist()), saved, cost)

    def _cheapest(self, kept: np.ndarray) -> np.ndarray:
        """``[N, H]``: what each head pays if its own K is given up."""
        cost = np.broadcast_to(self.stream, (len(kept), self.heads)).copy()
        for group in range(self.kv_heads):
            used = kept[:, group]
            cost[used] = np.minimum(cost[used], self.nearest[:, group])
        return cost

    def _by_group(self, cost: np.ndarray) -> np.ndarray:
        """``[N, H]`` summed over the query heads of each K/V head, ``[N, G]``."""
        return cost.reshape(len(cost), self.kv_heads, -1).sum(-1)


class _Best:
    """The cheapest choice so far for every number of units."""

    def __init__(self, layer: _Layer):
        self._layer = layer
        self.costs = np.full(2 * layer.kv_heads + 1, np.inf)  # of saving exactly so many
        self._kept: list[np.ndarray] = [np.ones(layer.kv_heads, dtype=bool)] * len(self.costs)

    def add(self, kept: np.ndarray) -> None:
        """Look at choices of who keeps K, ``[N, G]`` bool."""
        costs, _ = self._layer.curves(kept)
        row = costs.argmin(0)
        for units in np.flatnonzero(costs.min(0) < self.costs):
            self.costs[units] = costs[row[units], units]
            self._kept[units] = kept[row[units]]

    def splits(self) -> list[Split]:
        """For every number of units, the cheapest split that saves at least as many."""
        found: list[Split] = []
        for units in range(self._layer.most, -1, -1):
            if found and found[-1].cost <= self.costs[units]:
                found.append(found[-1])  # saves more for no more
                continue
            kept = self._kept[units]
            whole = np.zeros(self._layer.kv_heads, dtype=bool)
            _, order = self._layer.curves(kept[None])
            whole[order[0, : units - int((~kept).sum())]] = True
            found.append(self._layer.split(kept, whole, float(self.costs[units])))
        return found[::-1]


def _greedy(layer: _Layer) -> np.ndarray:
    """Who keeps K if one K/V head after the other gives it up, with all that was looked at."""
    kept = np.ones(layer.kv_heads, dtype=bool)
    seen = [kept[None]]
    while kept.any():
        fewer = kept & ~np.eye(layer.kv_heads, dtype=bool)[kept]
        costs, _ = layer.curves(fewer)
        seen.append(fewer)
        kept = fewer[costs[:, layer.kv_heads - kept.sum() + 1].argmin()]
    return np.concatenate(seen)


def _checked(cost: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """Costs as float64; infinite where there are none."""
    if cost is None:
        return np.full(shape, np.inf)
    found = cost.double().numpy(force=True)
    if found.shape != shape or not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(f"costs must be {list(shape)} finite numbers of at least 0")
    return found
