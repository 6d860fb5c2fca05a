"""Batched k-means of heads from their Gram matrix, reproducible to the head.

k-means needs only inner products of the points, so the features (score maps of any size) are
never stored: their Gram matrix, ``[H, H]``, is accumulated instead, and the inertia of any
clustering is exact. Greedy seeding picks the heads that lower the error most; then single heads
move between clusters while that lowers the inertia (Hartigan and Wong, 1979), which ends in an
optimum at least as good as Lloyd's and can never empty a cluster.

Ties: costs within ``TIE`` of the smallest, relative to the largest norm of a head, count as equal
and go to the lowest index. Two members of a two-head cluster are always equally far from its
centre, so without this rule rounding would choose the representative.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 1e-4


def kmeans(gram: Tensor, clusters: int) -> Tensor:
    """Cluster heads and return each head's representative, the medoid of its cluster.

    Runs on the device of ``gram``; on CUDA nothing is read on the host.

    Args:
        gram: ``[B, H, H]``, inner products of the heads' features, any float dtype.
        clusters: k, between 1 and H.

    Returns:
        ``[B, H]`` int64 with exactly k distinct representatives in every row.

    Raises:
        ValueError: k out of range.
    """
    heads = gram.shape[-1]
    if not 1 <= clusters <= heads:
        raise ValueError(f"cannot make {clusters} clusters of {heads} heads")
    gram = working_precision(gram)
    if clusters == heads:
        return torch.arange(heads, device=gram.device).expand(gram.shape[0], heads).clone()
    label = refine(gram, nearest_seed(gram, clusters), clusters)
    return medoids(gram, label)


def working_precision(gram: Tensor) -> Tensor:
    """Return the Gram matrix in the precision clusters are found in: float64 is slow on a GPU."""
    return gram.double() if gram.device.type == "cpu" else gram.float()


def squared_distances(gram: Tensor) -> Tensor:
    """``[..., H, H]`` squared Euclidean distances between the points of a Gram matrix."""
    norm = gram.diagonal(dim1=-2, dim2=-1)
    return (norm[..., :, None] + norm[..., None, :] - 2 * gram).clamp_min(0)


def tie_scale(gram: Tensor) -> Tensor:
    """Costs closer than this count as equal: ``[B]``."""
    return TIE * gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-30)


def lowest_argmin(cost: Tensor, tie: Tensor) -> Tensor:
    """Index of the smallest cost along the last axis; the lowest index within ``tie`` of it.

    ``tie`` broadcasts against ``cost`` without its last axis.
    """
    local = cost <= cost.amin(-1, keepdim=True) + tie[..., None]
    index = torch.arange(cost.shape[-1], device=cost.device)
    return torch.where(local, index, cost.shape[-1]).amin(-1)


def nearest_seed(gram: Tensor, clusters: int) -> Tensor:
    """Choose k heads greedily as seeds; return the label of each head's nearest: ``[B, H]``.

    Each step takes the head that lowers the summed squared distance to the nearest seed most.
    """
    batch, heads = gram.shape[:2]
    distance = squared_distances(gram)
    tie = tie_scale(gram)
    best = torch.full((batch, heads), torch.inf, device=gram.device, dtype=gram.dtype)
    label = torch.zeros(batch, heads, dtype=torch.long, device=gram.device)
    taken = torch.zeros(batch, heads, dtype=torch.bool, device=gram.device)
    rows = torch.arange(batch, device=gram.device)
    for step in range(clusters):
        total = torch.minimum(best[:, None, :], distance).sum(-1)  # [B, candidate]
        seed = lowest_argmin(total.masked_fill(taken, torch.inf), tie)
        to_seed = distance[rows, seed]  # [B, H]
        # strictly nearer by the tie margin: equal heads stay with the earlier seed
        nearer = to_seed < best - tie[:, None]
        nearer[rows, seed] = True
        nearer &= ~taken
        label = torch.where(nearer, step, label)
        best = torch.where(nearer, to_seed, best)
        taken[rows, seed] = True
    return label


def refine(gram: Tensor, label: Tensor, clusters: int) -> Tensor:
    """Move single heads between clusters while it lowers the inertia: ``[B, H]`` labels.

    Every step makes, in each row, the one best move; at most 2 H steps, in practice a few.
    """
    batch, heads = label.shape
    label = label.clone()
    one_hot = torch.nn.functional.one_hot(label, clusters).to(gram.dtype)  # [B, H, k]
    norm = gram.diagonal(dim1=-2, dim2=-1)  # [B, H]
    tie = tie_scale(gram)
    rows = torch.arange(batch, device=gram.device)
    for _ in range(2 * heads):
        size = one_hot.sum(1)  # [B, k]
        cross = gram @ one_hot  # [B, H, k], inner products with the sum of each cluster
        within = (one_hot * cross).sum(1)  # [B, k]
        count = size.clamp_min(1)
        distance = norm[:, :, None] - 2 * cross / count[:, None] + (within / count**2)[:, None]
        own_size = size.gather(1, label)
        own = distance.gather(2, label[:, :, None]).squeeze(2)
        leave = own * own_size / (own_size - 1).clamp_min(1)
        join = distance * (size / (size + 1))[:, None]
        change = join - leave[:, :, None]
        forbidden = (own_size <= 1)[:, :, None] | (one_hot > 0)
        change = change.masked_fill(forbidden, torch.inf).flatten(1)
        move = lowest_argmin(change, tie)  # [B], head * k + cluster
        better = change[rows, move] < -tie
        if gram.device.type == "cpu" and not bool(better.any()):
            break
        head, target = move // clusters, move % clusters
        label[rows, head] = torch.where(better, target, label[rows, head])
        one_hot = torch.nn.functional.one_hot(label, clusters).to(gram.dtype)
    return label


def medoids(gram: Tensor, label: Tensor) -> Tensor:
    """Each head's representative: the member of its cluster nearest the centre: ``[B, H]``."""
    same = label[:, :, None] == label[:, None, :]  # [B, H, H]
    size = same.sum(-1).to(gram.dtype)
    cross = (gram * same).sum(-1) / size  # [B, H], inner product with the own centre
    # the centre's norm is the same for all members of a cluster, so it cannot change the choice
    distance = gram.diagonal(dim1=-2, dim2=-1) - 2 * cross
    cost = distance[:, None, :].expand_as(gram).masked_fill(~same, torch.inf)
    return lowest_argmin(cost, tie_scale(gram)[:, None].expand(label.shape))


def inertia(gram: Tensor, representatives: Tensor) -> Tensor:
    """Sum of squared distances to the cluster means, ``[B]``, for any membership ``[B, H]``."""
    same = representatives[:, :, None] == representatives[:, None, :]
    size = same.sum(-1).to(gram.dtype)
    explained = (gram * same / size[:, :, None]).sum((1, 2))
    return (gram.diagonal(dim1=-2, dim2=-1).sum(1) - explained).clamp_min(0)
