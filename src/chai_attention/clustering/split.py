"""The best split of a layer's heads into kept, shared and streaming ones, for every saving.

A K/V head that keeps its K saves nothing. One that gives up K saves a *unit*: each of its query
heads uses the scores of the cheapest head whose K is kept, or streams (sees local keys only) where
that costs less. One whose query heads all stream needs no V of far keys either and saves two
units. In multi-head attention every head is a K/V head of its own.

Where heads are dealt to tensor-parallel ranks, each rank has a split of its own: nobody uses
scores of another rank, and all ranks keep as many K heads and as many V heads as each other, as
their pages have one size. A unit is then K, or V, of one K/V head on each rank.

Once it is known who keeps K, the rest is a sort: `_Heads.curves`. So only that choice is searched:
all choices of a rank are tried where that is quick, else `split_program` proves the best one.
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
        streaming: heads that see local keys only, ascending.
        saved: units, of 2 G / ranks in the layer.
        cost: summed over heads.
    """

    representatives: tuple[int, ...]
    streaming: tuple[int, ...]
    saved: int
    cost: float


def best_splits(
    sharing: Tensor | None,
    streaming: Tensor | None,
    kv_heads: int,
    heads: int | None = None,
    ranks: int = 1,
) -> list[Split]:
    """Return the cheapest splits that save at least 0, 1, 2, ... units, as far as it goes.

    Exact: proven by trying everything up to ``MAX_TRIED`` choices of the K/V heads that keep K,
    and where nothing is shared; else by linear and integer programs to a relative gap of 1e-6. An
    integer program that takes longer than `split_program.TIME_LIMIT` gives the best that it found.

    Args:
        sharing: ``[H, H]``, what head h (row) pays for the scores of head r (column), at least 0;
            None if no head may share.
        streaming: ``[H]``, what head h pays for seeing local keys only, at least 0; None if no
            head may stream.
        kv_heads: G.
        heads: H, where neither cost is given.
        ranks: that hold G / ranks neighbouring K/V heads each.

    Returns:
        The split for every number of units: up to 2 G / ranks with streaming, else G / ranks - 1
        with sharing, else 0. Costs never fall; a split may save more than its place says.

    Raises:
        ValueError: costs that are negative or not finite, heads that do not split over the K/V
            heads, or K/V heads that do not split over the ranks.
    """
    given = next((x for x in (sharing, streaming) if x is not None), None)
    heads = heads if given is None else len(given)
    if heads is None or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} heads cannot be split over {kv_heads} K/V heads")
    if ranks < 1 or kv_heads % ranks:
        raise ValueError(f"{kv_heads} K/V heads cannot be split over {ranks} ranks")
    share, stream = _checked(sharing, (heads, heads)), _checked(streaming, (heads,))
    own, local = heads // ranks, kv_heads // ranks
    spans = [slice(rank * own, (rank + 1) * own) for rank in range(ranks)]
    parts = [_Heads(share[mine, mine], stream[mine], local) for mine in spans]
    best = _Best(parts)
    if sharing is None:  # the cheapest K/V heads stream
        for rank, part in enumerate(parts):
            best.add(rank, _cheapest_stream(part))
    elif 1 << local <= MAX_TRIED:
        every = np.array(list(product((True, False), repeat=local)))
        for rank in range(ranks):
            best.add(rank, every)
    else:
        for rank, part in enumerate(parts):
            best.add(rank, _greedy(part))
        nearest = np.full((heads, kv_heads), np.inf)
        for rank, part in enumerate(parts):
            nearest[spans[rank], rank * local : (rank + 1) * local] = part.nearest
        program = Program(nearest, stream, np.arange(heads) // (heads // kv_heads), ranks)
        for units in range(1, best.most + 1):
            known = best.cheapest(units)
            found = program.kept(units, known)
            if found is not None:
                for rank, kept in enumerate(found.reshape(ranks, local)):
                    best.add(rank, kept[None])
    return best.splits()


class _Heads:
    """Costs of the heads of a layer, or of those that one rank holds, by K/V heads.

    Args:
        share: ``[H, H]``, infinite if no head may share.
        stream: ``[H]``, infinite if no head may stream.
        kv_heads: G, of these heads.
    """

    def __init__(self, share: np.ndarray, stream: np.ndarray, kv_heads: int):
        self.heads, self.kv_heads = len(stream), kv_heads
        self.own = np.arange(self.heads) // (self.heads // kv_heads)  # K/V head of each head
        self.share, self.stream = share, stream
        # the cheapest head of each K/V head
        self.nearest = share.reshape(self.heads, kv_heads, -1).min(-1)
        self.streamed = self._by_group(stream[None])[0]  # of a whole K/V head

    def curves(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cheapest costs with exactly so many K/V heads whose V is given up, too.

        Args:
            kept: ``[N, G]`` bool, K/V heads that keep their K.

        Returns:
            ``[N, G + 1]`` costs, infinite where it cannot be, and ``[N, G]``: the K/V heads in
            the order in which they stream whole, those that keep K at the end.
        """
        given_up = (~kept).sum(1)
        price = self._price(kept)
        cheapest = np.minimum(price, self.stream)
        # whose V stays has at least one query head that does not stream
        with np.errstate(invalid="ignore"):
            forced = np.where(np.isinf(price), np.inf, price - cheapest)
            with_value = self._by_group(cheapest) + forced.reshape(
                len(kept), self.kv_heads, -1
            ).min(-1)
            more = self.streamed - with_value  # what streaming whole adds
        more[np.isnan(more)] = 0.0  # neither can be
        more = np.where(kept, np.inf, np.minimum(more, np.finfo(float).max))
        order = np.argsort(more, axis=1, kind="stable")
        place = np.arange(self.kv_heads)
        without_k = place < given_up[:, None]  # in that order
        streamed = np.broadcast_to(self.streamed, kept.shape)
        whole = np.where(without_k, np.take_along_axis(streamed, order, 1), 0.0)
        rest = np.where(without_k, np.take_along_axis(with_value, order, 1), 0.0)
        nothing = np.zeros((len(kept), 1))
        costs = np.concatenate([nothing, whole.cumsum(1)], 1)
        costs += np.concatenate([rest[:, ::-1].cumsum(1)[:, ::-1], nothing], 1)
        costs[np.arange(self.kv_heads + 1) > given_up[:, None]] = np.inf
        return costs, order

    def does(self, kept: np.ndarray, whole: int) -> tuple[np.ndarray, np.ndarray, float]:
        """What heads do if ``kept [G]`` keep K and ``whole`` K/V heads give up V.

        Returns:
            ``[H]`` representatives, ``[H]`` bool who streams, and the cost.
        """
        _, order = self.curves(kept[None])
        streams_whole = np.isin(self.own, order[0, :whole])
        allowed = kept[self.own]
        price = np.where(allowed, self.share, np.inf)
        least = price.min(1)
        alone = (streams_whole | (self.stream <= least)) & ~allowed
        for group in np.flatnonzero(~kept):
            mine = np.flatnonzero(self.own == group)
            if alone[mine].all() and not streams_whole[mine[0]]:
                alone[mine[(least[mine] - self.stream[mine]).argmin()]] = False
        own = np.arange(self.heads)
        rep = np.where(allowed | alone, own, price.argmin(1))
        cost = self.stream[alone].sum() + least[~(allowed | alone)].sum()
        return rep, alone, float(cost)

    def _price(self, kept: np.ndarray) -> np.ndarray:
        """``[N, H]``: what each head pays for the scores of the cheapest kept K/V head."""
        price = np.full((len(kept), self.heads), np.inf)
        for group in range(self.kv_heads):
            used = kept[:, group]
            price[used] = np.minimum(price[used], self.nearest[:, group])
        return price

    def _by_group(self, cost: np.ndarray) -> np.ndarray:
        """``[N, H]`` summed over the query heads of each K/V head, ``[N, G]``."""
        return cost.reshape(len(cost), self.kv_heads, -1).sum(-1)


class _Best:
    """The cheapest choice so far, for every number of K and of V heads that each rank gives up."""

    def __init__(self, parts: list[_Heads]):
        self._parts = parts
        self._local = parts[0].kv_heads
        size = self._local + 1
        self._costs = np.full((len(parts), size, size), np.inf)  # by rank, K given up, V given up
        self._kept = np.ones((len(parts), size, size, self._local), dtype=bool)
        streams = np.isfinite(parts[0].stream).all()
        shares = np.isfinite(parts[0].share).all()
        self.most = 2 * self._local if streams else self._local - 1 if shares else 0

    def add(self, rank: int, kept: np.ndarray) -> None:
        """Look at choices of who keeps K on a rank, ``[N, G / ranks]`` bool."""
        costs, _ = self._parts[rank].curves(kept)
        given_up = (~kept).sum(1)
        for keys in np.unique(given_up):
            rows = np.flatnonzero(given_up == keys)
            row = rows[costs[rows].argmin(0)]
            found = costs[row, np.arange(len(row))]
            better = found < self._costs[rank, keys]
            self._costs[rank, keys, better] = found[better]
            self._kept[rank, keys, better] = kept[row[better]]

    def cheapest(self, units: int) -> float:
        """Cost of saving at least so many units."""
        total = self._costs.sum(0)
        keys, values = np.indices(total.shape)
        return float(total[keys + values >= units].min())

    def splits(self) -> list[Split]:
        """For every number of units, the cheapest split that saves at least as many."""
        total = self._costs.sum(0)
        found: list[Split] = []
        for units in range(self.most, -1, -1):
            keys = np.arange(max(0, units - self._local), min(units, self._local) + 1)
            cost = total[keys, units - keys]
            if found and found[-1].cost <= cost.min():
                found.append(found[-1])  # saves more for no more
                continue
            chosen = int(keys[cost.argmin()])
            made = self._split(chosen, units - chosen)
            found.append(found[-1] if found and found[-1].cost <= made.cost else made)
        return found[::-1]

    def _split(self, keys: int, values: int) -> Split:
        """The split in which every rank gives up so many K and V heads."""
        rep: list[int] = []
        streaming: list[int] = []
        total = 0.0
        for part, table in zip(self._parts, self._kept, strict=True):
            chosen, alone, cost = part.does(table[keys, values], values)
            first = len(rep)
            rep += (chosen + first).tolist()
            streaming += (np.flatnonzero(alone) + first).tolist()
            total += cost
        return Split(tuple(rep), tuple(streaming), keys + values, total)


def _cheapest_stream(part: _Heads) -> np.ndarray:
    """Who keeps K where no head shares: all but the 0, 1, 2, ... cheapest, which stream."""
    order = np.argsort(part.streamed, kind="stable")
    kept = np.ones((part.kv_heads + 1, part.kv_heads), dtype=bool)
    for count in range(part.kv_heads + 1):
        kept[count, order[:count]] = False
    return kept


def _greedy(part: _Heads) -> np.ndarray:
    """Who keeps K if one K/V head after the other gives it up, with all that was looked at."""
    kept = np.ones(part.kv_heads, dtype=bool)
    seen = [kept[None]]
    while kept.any():
        fewer = kept & ~np.eye(part.kv_heads, dtype=bool)[kept]
        costs, _ = part.curves(fewer)
        seen.append(fewer)
        kept = fewer[costs.min(1).argmin()]
    return np.concatenate(seen)


def _checked(cost: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """Costs as float64; infinite where there are none."""
    if cost is None:
        return np.full(shape, np.inf)
    found = cost.double().numpy(force=True)
    if found.shape != shape or not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(f"costs must be {list(shape)} finite numbers of at least 0")
    return found
