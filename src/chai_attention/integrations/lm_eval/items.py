"""What a model made of single items of a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CHOICE, CONTINUATION, TEXT, RECALLED = "choice", "continuation", "text", "recall"
KINDS = (CHOICE, CONTINUATION, TEXT, RECALLED)


@dataclass(frozen=True)
class Item:
    """What a model made of one item.

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


def read_item(values: Any) -> Item:
    """An item from the JSON of its fields.

    Raises:
        TypeError: other fields, or a value of another kind; ValueError: no likelihood.
    """
    if not isinstance(values, dict) or set(values) != set(_KINDS):
        raise TypeError("an item has other fields")
    for name, kinds in _KINDS.items():
        if not isinstance(values[name], kinds) or isinstance(values[name], bool):
            raise TypeError(f"{name} of an item is {values[name]!r}")
    likelihoods = tuple(values["loglikelihoods"])
    if not all(isinstance(one, _NUMBER) and not isinstance(one, bool) for one in likelihoods):
        raise TypeError("a likelihood is no number")
    if not likelihoods:
        raise ValueError("an item has no likelihood")
    return Item(**{**values, "loglikelihoods": likelihoods})


_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("doc", "tokens"), (int,)),
    "digest": (str,),
    **dict.fromkeys(("gold", "chosen", "chosen_norm"), (int, type(None))),
    "loglikelihoods": (list,),
    **dict.fromkeys(("acc", "acc_norm"), (*_NUMBER, type(None))),
    "nll": _NUMBER,
}
