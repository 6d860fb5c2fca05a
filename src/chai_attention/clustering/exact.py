"""k-medoids to the proven optimum, for the offline phase, where a millisecond does not matter."""

from __future__ import annotations

import warnings
from math import comb

import numpy as np
import torch
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array, hstack, identity, kron
from torch import Tensor

from chai_attention.clustering.assign import K_BYTES, SCORES, TARGETS, assign_by_cost
from chai_attention.clustering.kmeans import TIE
from chai_attention.clustering.kmedoids import MAX_CHOICES


def best_assignment(cost: Tensor, clusters: int, kv_heads: int, target: str = SCORES) -> Tensor:
    """Return each head's representative, with the lowest sum of costs that is possible.

    Few choices are all tried; many are searched by integer programming (the p-median problem,
    whose linear relaxation is nearly always integral).

    Args:
        cost: ``[H, H]``, what head h (row) pays for the scores of head r; at least 0.
        clusters: k, the number of representatives.
        kv_heads: G.
        target: "scores" chooses heads, "k-bytes" whole K/V heads.

    Returns:
        ``[H]`` int64.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    heads = cost.shape[0]
    groups = kv_heads if target == K_BYTES else heads
    kept = clusters * groups // heads
    if comb(groups, kept) <= MAX_CHOICES:
        return assign_by_cost(cost[None], clusters, kv_heads, target)[0]
    own = torch.arange(heads) // (heads // groups)
    nearest = cost.double().view(heads, groups, -1).amin(-1)
    nearest[torch.arange(heads), own] = 0.0
    chosen = _p_median(nearest.numpy(), kept)
    if chosen is None:  # out of time: the best that swapping finds
        return assign_by_cost(cost[None], clusters, kv_heads, target)[0]
    allowed = torch.from_numpy(chosen)[own]
    # everything else costs more than any pair: the choice is made, the nearest remain
    barred = cost.double().masked_fill(~allowed, torch.inf)
    limit = barred.amin(1, keepdim=True) + TIE * cost.amax()
    choice = (barred <= limit).long().argmax(1)
    return torch.where(allowed, torch.arange(heads), choice)


def _p_median(nearest: np.ndarray, kept: int) -> np.ndarray | None:
    """Which ``kept`` columns to open so that rows reach their nearest cheaply: bool."""
    rows, columns = nearest.shape
    # x[row, column]: row uses column; y[column]: column is open
    uses_one = hstack([kron(identity(rows), np.ones((1, columns))), csr_array((rows, columns))])
    only_open = hstack([identity(rows * columns), -kron(np.ones((rows, 1)), identity(columns))])
    count = hstack([csr_array((1, rows * columns)), csr_array(np.ones((1, columns)))])
    scale = nearest.max() or 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = milp(
            np.concatenate([nearest.ravel() / scale, np.zeros(columns)]),
            integrality=np.concatenate([np.zeros(rows * columns), np.ones(columns)]),
            bounds=(0, 1),
            constraints=[
                LinearConstraint(uses_one.tocsc(), 1, 1),
                LinearConstraint(only_open.tocsc(), -np.inf, 0),
                LinearConstraint(count.tocsc(), kept, kept),
            ],
            options={"time_limit": 10.0},
        )
    return None if found.x is None else found.x[-columns:] > 0.5
