"""Perplexity of a model on windows of tokens, and the paired comparison of two runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.logits import rows_at_once, token_losses
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.ops.choice import reproducible


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood per token of each window, in nats.

    Attributes:
        per_window: one mean per window of text.
    """

    per_window: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over windows, nats per token."""
        return sum(self.per_window) / len(self.per_window)

    @property
    def perplexity(self) -> float:
        """``exp(mean)``; infinite where that is more than a float holds."""
        return _exp(self.mean)

    @property
    def finite(self) -> bool:
        """Whether every window has a loss that is a number."""
        return all(map(math.isfinite, self.per_window))


@dataclass(frozen=True)
class PairedRise:
    """Relative rise of perplexity between two runs over the same windows.

    Attributes:
        rise: ``perplexity / baseline perplexity - 1``.
        standard_error: of the rise, from the differences window by window.
    """

    rise: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.rise:+.2%} ±{self.standard_error:.2%}"


@torch.no_grad()
@reproducible()
def token_loss(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Loss:
    """Score windows of text; every token but a window's first is predicted from those before it.

    The model runs in eval mode, and is left in the mode it was in.

    Args:
        model: a causal language model, clustered heads enabled or not.
        windows: ``[N, S]`` int64 token ids.
        batch_size: windows per forward; fewer where they are long.
        progress: called with (windows done, windows in all).

    Raises:
        ValueError: no window, or windows of fewer than two tokens.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError("perplexity needs at least one window of two or more tokens")
    losses: list[float] = []
    with evaluating(model):
        for batch in windows.split(rows_at_once(batch_size, windows.shape[1])):
            losses += token_losses(model, batch.to(input_device(model))).mean(1).tolist()
            if progress is not None:
                progress(len(losses), windows.shape[0])
    return Loss(tuple(losses))


def paired_rise(baseline: Loss, other: Loss) -> PairedRise:
    """Compare two runs over the same windows.

    The difference of the log-likelihoods is taken window by window, so that what makes one text
    harder than another cancels out; the error of the rise follows by the delta method.
    """
    if len(baseline.per_window) != len(other.per_window):
        raise ValueError("both runs must score the same windows")
    difference = torch.tensor(other.per_window) - torch.tensor(baseline.per_window)
    count = len(difference)
    ratio = _exp(difference.mean().item())
    spread = difference.std().item() / math.sqrt(count) if count > 1 else math.nan
    return PairedRise(ratio - 1, ratio * spread)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
