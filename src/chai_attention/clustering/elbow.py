"""How many clusters a layer needs: the error for every number, and the elbow of that curve."""

from __future__ import annotations

import warnings

from kneed import KneeLocator
from torch import Tensor

from chai_attention.clustering.assign import K_BYTES, assign, rank_parts
from chai_attention.clustering.kmeans import inertia, squared_distances

LEAST_BEND = 0.1  # share of the error by which a short curve's elbow lies below a straight line


def cluster_counts(heads: int, kv_heads: int, target: str, ranks: int = 1) -> list[int]:
    """Numbers of representatives a layer can have, ascending; the last keeps all heads.

    With several ranks those that all ranks have as many of.
    """
    step = ranks * (heads // kv_heads if target == K_BYTES else 1)
    return list(range(step, heads + 1, step))


def error_curve(gram: Tensor, kv_heads: int, target: str, ranks: int = 1) -> list[float]:
    """Clustering error for every entry of `cluster_counts`, relative to the first.

    For "scores" the k-means inertia (CHAI, 3.2), the squared distance of every head's features
    from its cluster's mean; for "k-bytes" the squared distance from its representative's. 0 with
    all heads kept. Never rises: a solver's local optimum is replaced by the better one before it.

    Args:
        gram: ``[H, H]`` inner products of the heads' features.
        kv_heads: G.
        target: "scores" or "k-bytes".
        ranks: that cluster H / ranks neighbouring heads each, by themselves.
    """
    local = kv_heads // ranks
    parts = [absolute_errors(part, local, target) for _, part in rank_parts(gram, ranks)]
    errors = [sum(each) for each in zip(*parts, strict=True)]
    first = errors[0]
    return [error / first for error in errors] if first > 0 else [0.0 for _ in errors]


def absolute_errors(gram: Tensor, kv_heads: int, target: str) -> list[float]:
    """`error_curve` of one rank's heads, absolute."""
    batch = gram[None].double()
    heads = gram.shape[0]
    errors: list[float] = []
    for clusters in cluster_counts(heads, kv_heads, target):
        rep = assign(batch, clusters, kv_heads, target)
        if target == K_BYTES:
            error = squared_distances(batch)[0].gather(1, rep.T).sum().item()
        else:
            error = inertia(batch, rep).item()
        errors.append(min([error, *errors[-1:]]))
    return errors


def elbow(counts: list[int], errors: list[float], max_error: float | None = None) -> int:
    """Choose a number of clusters at the elbow of the error curve (CHAI, 3.2).

    Args:
        counts: numbers of clusters, ascending; the last keeps all heads.
        errors: the error of each, falling.
        max_error: never choose fewer clusters than needed for an error of at most this.

    Returns:
        One of ``counts``; the last if the curve has no elbow.
    """
    if errors[0] <= 0:
        return counts[0]  # all heads agree completely
    chosen = _knee(counts, errors)
    if max_error is None:
        return chosen
    enough = next(k for k, error in zip(counts, errors, strict=True) if error <= max_error)
    return max(chosen, enough)


def _knee(counts: list[int], errors: list[float]) -> int:
    """Return the first knee of a falling curve (Kneedle); the last count if there is none."""
    # Kneedle asks a curve to return from its knee by S times the spacing of its points, which a
    # short one cannot with the usual S of 1: its knee has to lie LEAST_BEND below the line
    sensitivity = min(1.0, LEAST_BEND * (len(counts) - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kneed warns where there is no knee
        found = KneeLocator(
            counts, errors, S=sensitivity, curve="convex", direction="decreasing", online=True
        ).all_knees
    # where a curve begins flat, kneed takes its first point for a knee
    drop = (errors[0] - errors[-1]) / (counts[-1] - counts[0]) if len(counts) > 1 else 0.0
    line = {k: errors[0] - drop * (k - counts[0]) for k in counts}
    below = [k for k, e in zip(counts, errors, strict=True) if k in found and e < line[k]]
    return below[0] if below else counts[-1]
