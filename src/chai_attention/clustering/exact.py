"""Exact k-medoids, for calibration, where a millisecond does not matter."""

from __future__ import annotations

from math import comb

import numpy as np
import torch
from torch import Tensor

from chai_attention.clustering.assign import K_BYTES, SCORES, assign_by_cost
from chai_attention.clustering.kmeans import TIE
from chai_attention.clustering.kmedoids import MAX_CHOICES
from chai_attention.clustering.split_program import Program


def best_assignment(cost: Tensor, clusters: int, kv_heads: int, target: str = SCORES) -> Tensor:
    """Return each head's representative, with the lowest sum of costs that is possible.

    Few choices are all tried; of many the best is found by a `Program`, unless it is out of time:
    then this is the best that swapping finds.

    Args:
        cost: ``[H, H]``, what head h (row) pays for the scores of head r; at least 0.
        clusters: k, the number of representatives.
        kv_heads: G.
        target: "scores" chooses heads, "k-bytes" whole K/V heads.

    Returns:
        ``[H]`` int64.
    """
    heads = cost.shape[0]
    groups = kv_heads if target == K_BYTES else heads
    kept = clusters * groups // heads
    found = assign_by_cost(cost[None], clusters, kv_heads, target)[0]
    if comb(groups, kept) <= MAX_CHOICES:
        return found
    each = torch.arange(heads)
    own = each // (heads // groups)
    nearest = cost.double().view(heads, groups, -1).amin(-1)
    nearest[each, own] = 0.0
    known = nearest[each, own[found]].sum().item()
    program = Program(nearest.numpy(), np.full(heads, np.inf), own.numpy())
    chosen = program.kept(groups - kept, known)
    if chosen is None:
        return found
    chosen[np.flatnonzero(~chosen)[: kept - chosen.sum()]] = True  # fewer that cost as little
    allowed = torch.from_numpy(chosen)[own]
    # everything else costs more than any pair: the choice is made, the nearest remain
    barred = cost.double().masked_fill(~allowed, torch.inf)
    limit = barred.amin(1, keepdim=True) + TIE * cost.amax()
    choice = (barred <= limit).long().argmax(1)
    return torch.where(allowed, each, choice)
