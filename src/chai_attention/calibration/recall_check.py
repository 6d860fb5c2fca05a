"""Measures how many facts hidden in held-out text a model recalls, in words new to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.budget import CONFIDENCE
from chai_attention.calibration.recall import RecallCase, recall_cases
from chai_attention.calibration.recall_score import recall_score
from chai_attention.calibration.recall_words import HELD_OUT
from chai_attention.errors import CalibrationError
from chai_attention.progress import Report

FACTS = (1, 4)
CASES = 48  # of a task, in sequences
LEAST_LONG_CASES = 16  # in longer ones, or one for each of these
LEAST_RECALLED = 0.2  # share of its cases that the full model recalls, or a task says nothing
FIRST_CASES = 16  # a model that gets all of these wrong is asked no more

Answers = tuple[Tensor, Tensor]  # correct [N] bool, nll [N] float32


@dataclass(frozen=True)
class RecallTask:
    """Questions about texts of ``length`` tokens, each with as many facts."""

    facts: int
    length: int
    cases: Sequence[RecallCase]


@dataclass(frozen=True)
class RecallFall:
    """How far the share of facts that are recalled falls, in the mean over tasks.

    Attributes:
        fall: as a share, 0.02 for 2 points; negative if more are recalled.
        standard_error: binomial, paired by cases: of those whose answer becomes wrong or right,
            and one more, so that few cases without a change are not taken as certain.
        tasks: what was found, task by task.
    """

    fall: float
    standard_error: float
    tasks: Sequence[dict[str, Any]]

    def within(self, most: float) -> bool:
        """Whether it is at most that, with 95% confidence."""
        return self.fall + CONFIDENCE * self.standard_error <= most

    def __str__(self) -> str:
        return f"{100 * self.fall:.1f} points ±{100 * self.standard_error:.1f}"


@dataclass
class RecallCheck:
    """Questions about held-out text, and what the model answers without clustered heads.

    Attributes:
        tasks: to ask.
        note: why there are none, or not all.
    """

    tasks: Sequence[RecallTask]
    note: str | None = None
    _plain: list[Answers] = field(default_factory=list)

    def begin(self, model: PreTrainedModel, progress: Report) -> None:
        """Ask the model without clustered heads; tasks that it fails are left out.

        Perplexity can be promised for any model, recall only where the model recalls at all.
        """
        answers = self._answers(model, progress, give_up=True)
        fit = [a[0].float().mean().item() >= LEAST_RECALLED for a in answers]
        if not all(fit):
            told = [
                f"{int(a[0].sum())} of {len(a[0])} ({task.facts} fact{'s' * (task.facts > 1)}, "
                f"{task.length} tokens)"
                for task, a, good in zip(self.tasks, answers, fit, strict=True)
                if not good
            ]
            self.note = f"the full model recalls {', '.join(told)}: too few to promise anything"
        self.tasks = [task for task, good in zip(self.tasks, fit, strict=True) if good]
        self._plain = [a for a, good in zip(answers, fit, strict=True) if good]

    def measure(self, model: PreTrainedModel, progress: Report) -> RecallFall:
        """Ask the model with clustered heads, after `begin`, with at least one task."""
        rows, falls, variance = [], [], 0.0
        for task, plain, now in zip(
            self.tasks, self._plain, self._answers(model, progress), strict=True
        ):
            lost = int((plain[0] & ~now[0]).sum())
            gained = int((~plain[0] & now[0]).sum())
            count = len(task.cases)
            falls.append((lost - gained) / count)
            variance += (lost + gained - (lost - gained) ** 2 / count) / count**2
            rows.append(
                {
                    "facts": task.facts,
                    "length": task.length,
                    "cases": count,
                    "full": int(plain[0].sum()),
                    "clustered": int(now[0].sum()),
                    "nll_rise": round(float((now[1] - plain[1]).mean()), 4),
                }
            )
        mean = sum(falls) / len(falls)
        one_more = 1 / sum(len(task.cases) for task in self.tasks) ** 2
        return RecallFall(mean, math.sqrt(variance / len(falls) ** 2 + one_more), rows)

    def _answers(
        self,
        model: PreTrainedModel,
        progress: Report,
        *,
        give_up: bool = False,
    ) -> list[Answers]:
        """Answers to every task; with ``give_up`` to its first cases only if all are wrong."""
        total = sum(len(task.cases) for task in self.tasks)
        found: list[Answers] = []
        done = 0
        for task in self.tasks:

            def report(now: int, _: int, before: int = done) -> None:
                progress(before + now, total)

            first = task.cases[:FIRST_CASES] if give_up else task.cases
            answers = recall_score(model, first, progress=report)
            if len(first) < len(task.cases) and answers[0].any():
                more = recall_score(model, task.cases[FIRST_CASES:], progress=report)
                answers = torch.cat([answers[0], more[0]]), torch.cat([answers[1], more[1]])
            found.append(answers)
            done += len(task.cases)
        return found


def recall_check(
    tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[Tensor], seed: int
) -> RecallCheck:
    """Make questions about held-out sequences.

    Args:
        tokenizer: of the model; None for no questions.
        texts: ``[M, S]`` of one length each, the longest last.
        seed: of everything that is drawn.

    Returns:
        tasks of 1 and 4 facts at every length that has room for them.
    """
    if tokenizer is None:
        return RecallCheck([], "recall needs the model's tokenizer")
    tasks, note = [], None
    for place, text in enumerate(texts):
        count = CASES if place == 0 else max(LEAST_LONG_CASES, len(text))
        length = text.shape[1]
        for facts in FACTS:
            try:
                cases = recall_cases(
                    tokenizer, text, count, length, facts=facts, seed=seed, wording=HELD_OUT
                )
            except CalibrationError as error:
                note = note or str(error)
                continue
            tasks.append(RecallTask(facts, length, cases))
    return RecallCheck(tasks, note)
