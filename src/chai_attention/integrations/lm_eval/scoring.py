"""Let lm-eval score a task, and keep the score of each item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.task import Task
from torch import Tensor

from chai_attention.errors import EvaluationError
from chai_attention.integrations.lm_eval.items import CHOICE, CONTINUATION, RECALLED, TEXT, Item
from chai_attention.integrations.lm_eval.model import ChaiLM
from chai_attention.integrations.lm_eval.tasks import quiet
from chai_attention.results import digest

if TYPE_CHECKING:
    from chai_attention.calibration.recall import RecallCase


@dataclass(frozen=True)
class Scored:
    """All items of one task.

    Attributes:
        kind: "choice", "continuation", "text" or "recall".
        items: in the order of the task.
        metrics: lm-eval's own aggregates; of a text its perplexity.
        length: mean tokens of a request, context and answer.
    """

    kind: str
    items: tuple[Item, ...]
    metrics: dict[str, float]
    length: int


def score_task(lm: ChaiLM, task: Task, limit: int | None = None) -> Scored:
    """Let lm-eval evaluate a task with ``lm`` as it stands, and keep what each item got.

    Args:
        lm: the model, with the method to score in use (`ChaiLM.using`).
        task: from `load_task`.
        limit: items to take from the front; None for all.

    Raises:
        EvaluationError: an item without a single right answer, or a log-likelihood that is not a
            number.
    """
    name = task.task_name
    lm.lengths = {}
    with quiet():
        found = lm_eval.evaluate(
            lm=lm, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=0
        )
    kind = CHOICE if task.OUTPUT_TYPE == "multiple_choice" else CONTINUATION
    items = tuple(_item(lm, task, sample, kind) for sample in found["samples"][name])
    metrics = {
        key.split(",")[0]: float(value)
        for key, value in found["results"][name].items()
        if isinstance(value, int | float) and "stderr" not in key and "," in key
    }
    length = round(float(np.mean([sum(lengths) for lengths in lm.lengths.values()])))
    return Scored(kind, items, metrics, length)


def score_text(lm: ChaiLM, windows: Tensor) -> Scored:
    """Score the second half of every window of a text, given its first half.

    Two halves, so that methods which act on a finished cache are scored like all others.

    Args:
        lm: the model, with the method to score in use.
        windows: ``[N, S]`` int64 token ids, S of at least 4.
    """
    half = windows.shape[1] // 2
    answers = lm.score_ends(windows, half)
    tokens = windows.shape[1] - half
    items = tuple(
        _answer(index, digest(row.to(torch.int64)), value, -value / tokens, tokens)
        for index, (row, value) in enumerate(zip(windows, answers, strict=True))
    )
    perplexity = float(np.exp(np.mean([item.nll for item in items])))
    return Scored(TEXT, items, {"perplexity": perplexity}, windows.shape[1])


def recalled(cases: Sequence[RecallCase], correct: Tensor, nll: Tensor) -> Scored:
    """Items of questions about texts that `recall_score` has scored.

    Raises:
        EvaluationError: a log-likelihood that is not a number.
    """
    found = zip(cases, correct.double().tolist(), nll.tolist(), strict=True)
    items = tuple(
        _answer(index, case.digest, -value, value, len(case.answer), right)
        for index, (case, right, value) in enumerate(found)
    )
    length = round(float(np.mean([len(case.prompt) + len(case.answer) for case in cases])))
    return Scored(RECALLED, items, {"acc": float(correct.double().mean())}, length)


def _answer(
    doc: int, found: str, value: float, nll: float, tokens: int, acc: float | None = None
) -> Item:
    """An item with one answer, whose log-likelihood is ``value``."""
    return Item(doc, found, None, None, None, (_number(value, doc),), acc, None, nll, tokens)


def _item(lm: ChaiLM, task: Task, sample: dict[str, Any], kind: str) -> Item:
    number = int(sample["doc_id"])
    values = [_number(answer[0], number) for answer in sample["filtered_resps"]]
    gold = chosen = chosen_norm = None
    right = 0
    if kind == CHOICE:
        choices = task.doc_to_choice(sample["doc"])
        target = sample["target"]
        gold = choices.index(target) if isinstance(target, str) else target
        if not isinstance(gold, int) or not 0 <= gold < len(choices) or len(values) != len(choices):
            raise EvaluationError(
                f"item {number} of {task.task_name} has no single right answer: use lm_eval"
            )
        right = gold
        chosen = int(np.argmax(values))
        chosen_norm = int(np.argmax(np.array(values) / [float(len(c)) for c in choices]))
    return Item(
        doc=number,
        digest=str(sample["doc_hash"])[:16],
        gold=gold,
        chosen=chosen,
        chosen_norm=chosen_norm,
        loglikelihoods=tuple(values),
        acc=_metric(sample, "acc"),
        acc_norm=_metric(sample, "acc_norm"),
        nll=-values[right],
        tokens=lm.lengths[tuple(sample["arguments"][right])][1],
    )


def _metric(sample: dict[str, Any], name: str) -> float | None:
    return float(sample[name]) if name in sample else None


def _number(value: float, item: int) -> float:
    if not np.isfinite(value):
        raise EvaluationError(
            f"the log-likelihood of item {item} is {value}: run the model in float32 or bfloat16"
        )
    return float(value)
