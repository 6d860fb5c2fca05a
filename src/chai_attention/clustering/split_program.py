"""Which heads keep K in the cheapest split of a layer, by a linear or integer program.

It is the p-median problem, in which a head may also stream. Its linear relaxation is nearly always
integral and is solved faster than the integer program. Choices that alone cost more than a known
answer are left out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

TIME_LIMIT = 10.0  # seconds for one integer program
GAP = 1e-6  # relative to the best known cost


@dataclass(frozen=True, eq=False)
class Program:
    """Searches the cheapest way to save units in one layer.

    Attributes:
        nearest: ``[H, G]``, what head h pays for the cheapest scores of K/V head g.
        stream: ``[H]``, what head h pays for seeing local keys only; infinite if none may.
        own: ``[H]``, the K/V head of each head.
        ranks: that hold G / ranks neighbouring K/V heads each and give up as many K, and V heads,
            as each other; costs of scores of another rank are infinite.
    """

    nearest: np.ndarray
    stream: np.ndarray
    own: np.ndarray
    ranks: int = 1

    def kept(self, units: int, known: float) -> np.ndarray | None:
        """Return who keeps K, ``[G]`` bool, if ``units`` can be saved for less than ``known``.

        Args:
            units: to save on each rank, at least.
            known: cost of a split that saves as many.

        Returns:
            None if nothing is cheaper, or nothing was found in time.
        """
        if known <= 0:
            return None
        heads, groups = self.nearest.shape
        # on ranks a head may have to share although streaming costs less: all keep as many V heads
        limit = known if self.ranks > 1 else np.minimum(self.stream, known)[:, None]
        useful = self.nearest < limit
        useful[np.arange(heads), self.own] = False
        head, group = np.nonzero(useful)
        pairs = len(head)
        # x: head uses group; y: group keeps K; z: head streams; n: group streams whole
        y, z, n = pairs, pairs + groups, pairs + groups + heads
        size = n + groups
        index, each = np.arange(pairs), np.arange(heads)
        does_one = _matrix(
            size,
            heads,
            (head, index, 1.0),
            (each, y + self.own, 1.0),
            (each, z + each, 1.0),
        )
        only_kept = _matrix(size, pairs, (index, index, 1.0), (index, y + group, -1.0))
        all_stream = _matrix(size, heads, (each, n + self.own, 1.0), (each, z + each, -1.0))
        saves = np.zeros(size)
        saves[y:z], saves[n:] = -1.0, 1.0
        able = self.stream <= known
        cost = np.concatenate(
            [self.nearest[head, group], np.zeros(groups), np.where(able, self.stream, 0.0)]
        )
        upper = np.ones(size)
        upper[z:n] = able
        constraints = [
            LinearConstraint(does_one, 1, 1),
            LinearConstraint(all_stream, -np.inf, 0),
            LinearConstraint(saves[None], units * self.ranks - groups, np.inf),
            *self._alike(size, y, z, n),
        ]
        if pairs:
            constraints.append(LinearConstraint(only_kept, -np.inf, 0))
        problem = {
            "c": np.concatenate([cost / known, np.zeros(groups)]),
            "bounds": Bounds(0, upper),
            "constraints": constraints,
        }
        answer = _solved(problem)
        if answer is None or answer.fun >= 1 - GAP:
            return None
        whole = np.concatenate([answer.x[y:z], answer.x[n:]])
        if np.abs(whole - whole.round()).max() > GAP:
            whole_numbers = np.zeros(size)
            whole_numbers[y:z] = whole_numbers[n:] = 1
            options = {"time_limit": TIME_LIMIT, "mip_rel_gap": GAP}
            answer = _solved(problem | {"integrality": whole_numbers, "options": options})
            if answer is None:
                return None
        kept: np.ndarray = answer.x[y:z] > 0.5
        return kept

    def _alike(self, size: int, y: int, z: int, n: int) -> list[LinearConstraint]:
        """All ranks keep as many K heads, and V heads that are read, as the first."""
        if self.ranks == 1:
            return []
        heads, groups = self.nearest.shape
        rank = np.arange(groups) // (groups // self.ranks)
        other = np.flatnonzero(rank)
        same = [
            _matrix(
                size,
                self.ranks - 1,
                (rank[other] - 1, first + other, 1.0),
                *(
                    (np.full(groups - len(other), r), first + np.flatnonzero(rank == 0), -1.0)
                    for r in range(self.ranks - 1)
                ),
            )
            for first in (y, n)
        ]
        each = np.arange(heads)
        read = _matrix(
            size,
            groups,
            (self.own, z + each, 1.0),
            (np.arange(groups), n + np.arange(groups), -1.0),
        )
        return [
            *(LinearConstraint(matrix, 0, 0) for matrix in same),
            LinearConstraint(read, -np.inf, heads // groups - 1),
        ]


def _matrix(columns: int, rows: int, *entries: tuple[np.ndarray, np.ndarray, float]) -> csr_array:
    """Sparse ``[rows, columns]`` from (rows, columns, value)."""
    place = np.concatenate([row for row, _, _ in entries])
    column = np.concatenate([column for _, column, _ in entries])
    value = np.concatenate([np.full(len(row), value) for row, _, value in entries])
    return csr_array((value, (place, column)), shape=(rows, columns))


def _solved(problem: dict[str, Any]) -> OptimizeResult | None:
    """The answer of HiGHS; None if there is none, or none in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = milp(**problem)
    return found if found.x is not None else None
