"""The score of a single item of a task."""

from __future__ import annotations

from dataclasses import dataclass

CHOICE, CONTINUATION, TEXT, RECALLED = "choice", "continuation", "text", "recall"
KINDS = (CHOICE, CONTINUATION, TEXT, RECALLED)


@dataclass(frozen=True)
class Item:
    """How a model answered one item.

    Attributes:
        doc: number of the item in its task.
        digest: of the item's contents.
        gold: index of the right choice; None where there are no choices.
        chosen: the choice with the largest log-likelihood.
        chosen_norm: the same per character of the choice.
        loglikelihoods: of every choice, or of the one continuation, nats.
        acc: 1 or 0; None for a text.
        acc_norm: 1 or 0 by ``chosen_norm``; None where lm-eval's task has no such metric.
        nll: negative log-likelihood of the right answer, nats; of a text per token.
        tokens: of the right answer.
    """

    doc: int
    digest: str
    gold: int | None
    chosen: int | None
    chosen_norm: int | None
    loglikelihoods: tuple[float, ...]
    acc: float | None
    acc_norm: float | None
    nll: float
    tokens: int
