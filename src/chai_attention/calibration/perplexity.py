"""Perplexity of a model on sequences of tokens, and the paired comparison of two runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.logits import rows_at_once, token_losses
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.ops.choice import reproducible
from chai_attention.progress import Report, silent


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood per token of each sequence, in nats.

    Attributes:
        per_sequence: one mean per sequence.
    """

    per_sequence: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over sequences, nats per token."""
        return sum(self.per_sequence) / len(self.per_sequence)

    @property
    def perplexity(self) -> float:
        """``exp(mean)``; infinite where that is more than a float holds."""
        return _exp(self.mean)

    @property
    def finite(self) -> bool:
        """Whether every sequence has a loss that is a number."""
        return all(map(math.isfinite, self.per_sequence))


@dataclass(frozen=True)
class PairedRise:
    """Relative rise of perplexity between two runs over the same sequences.

    Attributes:
        rise: ``perplexity / baseline perplexity - 1``.
        standard_error: of the rise, from the differences sequence by sequence.
    """

    rise: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.rise:+.2%} ±{self.standard_error:.2%}"


@torch.no_grad()
@reproducible()
def token_loss(
    model: PreTrainedModel,
    sequences: Tensor,
    *,
    batch_size: int = 4,
    progress: Report = silent,
) -> Loss:
    """Score sequences; every token but a sequence's first is predicted from those before it.

    The model runs in eval mode, and is left in the mode it was in.

    Args:
        model: a causal language model, clustered heads enabled or not.
        sequences: ``[N, S]`` int64 token ids.
        batch_size: sequences per forward; fewer where they are long.
        progress: called with (sequences done, sequences in all).

    Raises:
        ValueError: no sequence, or sequences of fewer than two tokens.
    """
    if sequences.ndim != 2 or sequences.shape[0] == 0 or sequences.shape[1] < 2:
        raise ValueError("perplexity needs at least one sequence of two or more tokens")
    losses: list[float] = []
    with evaluating(model):
        for batch in sequences.split(rows_at_once(batch_size, sequences.shape[1])):
            losses += token_losses(model, batch.to(input_device(model))).mean(1).tolist()
            progress(len(losses), sequences.shape[0])
    return Loss(tuple(losses))


def paired_rise(baseline: Loss, other: Loss) -> PairedRise:
    """Compare two runs over the same sequences.

    The difference of the log-likelihoods is taken sequence by sequence, so that what makes one text
    harder than another cancels out; the error of the rise follows by the delta method.
    """
    if len(baseline.per_sequence) != len(other.per_sequence):
        raise ValueError("both runs must score the same sequences")
    difference = torch.tensor(other.per_sequence) - torch.tensor(baseline.per_sequence)
    count = len(difference)
    ratio = _exp(difference.mean().item())
    spread = difference.std().item() / math.sqrt(count) if count > 1 else math.nan
    return PairedRise(ratio - 1, ratio * spread)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
