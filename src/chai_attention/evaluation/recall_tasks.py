"""The task "recall": facts hidden in text, asked for at its end, at several lengths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.recall import recall_cases
from chai_attention.calibration.sizes import MOST_SAMPLES, longest_text
from chai_attention.calibration.texts import CHARACTERS_PER_TOKEN, load_texts, windows_of
from chai_attention.errors import EvaluationError
from chai_attention.evaluation.demo import built_in_text
from chai_attention.evaluation.tasks import RECALL, TEXT_TOKENS, TaskSource, recall_name
from chai_attention.results import digest

FACTS = (1, 4)
CASES = 100
SHORTEST = 1024
LONGEST = 32_768  # of the lengths that are taken without being asked for
_LENGTH = re.compile(r"(?P<number>[1-9]\d{0,8})(?P<thousands>k?)", re.IGNORECASE)


def recall_text(data: Path | None = None, text: str | None = None) -> list[str]:
    """Read the documents that facts are hidden in.

    Args:
        data: a folder; without ``text`` its recall.jsonl is read, if there is one.
        text: read as `load_texts` reads. Without either, English prose that every Python
            installation carries.

    Raises:
        CalibrationError: from `load_texts`.
    """
    if text is None and data is not None and (path := data / f"{RECALL}.jsonl").is_file():
        text = str(path)
    return built_in_text() if text is None else load_texts(text, tokens=TEXT_TOKENS, length=LONGEST)


def recall_sources(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    lengths: Sequence[int] | None = None,
    cases: int = CASES,
    seed: int = 0,
) -> list[TaskSource]:
    """Make the tasks ``recall-<facts>-<length>``: 1 and 4 facts at every length.

    The same arguments give the same cases; a case does not depend on how many there are.

    Args:
        model: whose context bounds the lengths.
        tokenizer: of the model.
        documents: from `recall_text`; repeated where they are shorter than a length.
        lengths: tokens of a question with its text and answer; None for `recall_lengths`.
        cases: of every task.
        seed: of the cases.

    Raises:
        EvaluationError: a length that the model cannot read.
        CalibrationError: one that is too short for the facts, no cases, or a chat template that
            cannot be used.
    """
    context = longest_text(model)
    sources = []
    for length in recall_lengths(context) if lengths is None else lengths:
        require_recall_length(length, context)
        characters = sum(map(len, documents))
        times = ceil(CHARACTERS_PER_TOKEN * (length + 1) / max(1, characters))
        text = windows_of([*documents] * times, tokenizer, MOST_SAMPLES, length, seed)
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
        text = text[order]
        for facts in FACTS:
            made = tuple(recall_cases(tokenizer, text, cases, length, facts=facts, seed=seed))
            found = digest(*(case.digest for case in made))
            sources.append(TaskSource(recall_name(facts, length), None, found, made))
    return sources


def require_recall_length(length: int, context: int | None) -> None:
    """Refuse texts longer than the ``context`` of a model; None: it does not say.

    Raises:
        EvaluationError: says what it reads.
    """
    if context is not None and length > context:
        raise EvaluationError(
            f"this model reads {context:,} tokens, not the {length:,} of --recall-lengths"
        )


def recall_lengths(context: int | None) -> tuple[int, ...]:
    """1,024 tokens and its doubles, up to the context of a model and at most `LONGEST`.

    Args:
        context: tokens that the model reads; None: of any number. The only length if it is short.
    """
    most = LONGEST if context is None else min(context, LONGEST)
    found = [SHORTEST]
    while 2 * found[-1] <= most:
        found.append(2 * found[-1])
    return tuple(found) if most >= SHORTEST else (most,)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Read lengths separated by commas, such as ``1k,2k`` or ``1024,3000``; 1k is 1,024.

    Raises:
        EvaluationError: something else.
    """
    matches = [_LENGTH.fullmatch(part.strip()) for part in text.split(",")]
    found = [int(m["number"]) * (1024 if m["thousands"] else 1) for m in matches if m is not None]
    if len(found) < len(matches):
        raise EvaluationError(f"--recall-lengths is numbers of tokens, such as 1k,2k, not {text!r}")
    return tuple(dict.fromkeys(found))
