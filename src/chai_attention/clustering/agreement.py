"""How far two clusterings of the same heads agree."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def adjusted_rand(first: Tensor, second: Tensor) -> Tensor:
    """Adjusted Rand index (Hubert and Arabie, 1985) of clusterings; names of clusters do not count.

    1 for equal clusterings, 0 on average for random ones of the same cluster sizes, negative below
    that. Clusterings that cannot differ, one cluster or one for every head in both, agree.

    Args:
        first: ``[..., H]`` int64, heads of one cluster have equal numbers, such as representatives.
        second: of a shape that broadcasts with it.

    Returns:
        ``[...]`` float64.
    """
    heads = first.shape[-1]
    above = torch.ones(heads, heads, dtype=torch.bool, device=first.device).triu(1)
    together = (first[..., :, None] == first[..., None, :]) & above
    also = (second[..., :, None] == second[..., None, :]) & above
    both = (together & also).sum((-2, -1)).double()
    ours, theirs = together.sum((-2, -1)).double(), also.sum((-2, -1)).double()
    expected = ours * theirs / max(1, heads * (heads - 1) // 2)
    most = (ours + theirs) / 2
    same = most == expected  # both all apart, or both all together
    return torch.where(same, 1.0, (both - expected) / torch.where(same, 1.0, most - expected))


def kept_share(before: Tensor, after: Tensor) -> float:
    """Share of heads that stay in their cluster, under the best matching of clusters.

    Clusters of ``before`` and ``after`` are paired one to one so that as many heads as possible
    are in a pair. Unlike `adjusted_rand` this is not corrected for chance: with many small
    clusters, or one large one, random clusterings keep a good part.

    Args:
        before: ``[H]`` int64.
        after: ``[H]`` int64.
    """
    _, left = np.unique(before.numpy(force=True), return_inverse=True)
    _, right = np.unique(after.numpy(force=True), return_inverse=True)
    table = np.zeros((left.max() + 1, right.max() + 1), dtype=np.int64)
    np.add.at(table, (left, right), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / len(left))
