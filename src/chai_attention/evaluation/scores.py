"""Means of items' scores with standard errors, paired or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error (0 for fewer than two values, as none can be told)."""

    mean: float
    error: float


def mean_of(values: Sequence[float]) -> Mean:
    """Mean of independent values; the error is lm-eval's: sample deviation over root n."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Mean(mean, 0.0)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(mean, math.sqrt(variance / count))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Mean:
    """Mean difference of two methods over the same items, with the error of that difference.

    What makes one item harder than another is in both, and cancels.

    Raises:
        ValueError: different numbers of items.
    """
    return mean_of([value - base for value, base in zip(values, baseline, strict=True)])


def average(means: Sequence[Mean]) -> Mean:
    """Unweighted mean over tasks, whose items are independent of each other's."""
    count = len(means)
    error = math.sqrt(math.fsum(mean.error**2 for mean in means)) / count
    return Mean(math.fsum(mean.mean for mean in means) / count, error)
