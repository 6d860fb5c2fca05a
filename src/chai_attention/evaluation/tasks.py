"""Which tasks an evaluation runs, and where their items come from."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_attention.atomic_write import read_whole
from chai_attention.calibration.texts import load_texts
from chai_attention.errors import EvaluationError
from chai_attention.evaluation.passages import last_word_items
from chai_attention.results import digest
from chai_attention.strict_json import MOST_BYTES, parse_json

if TYPE_CHECKING:
    from chai_attention.calibration.recall import RecallCase

# the five of the paper (section 4.1), by their names in lm-eval
PAPER = ("piqa", "hellaswag", "arc_challenge", "arc_easy", "boolq")
LAMBADA = "lambada_openai"
LAST_WORD, PERPLEXITY = "last_word", "perplexity"
RECALL = "recall"  # stands for tasks that `recall_sources` makes for a model
SETS = {"paper": PAPER, "lambada": (LAMBADA,)}
_TEXT_NAME = re.compile(rf"{PERPLEXITY}(?:-(?P<length>[1-9]\d*))?")
_RECALL_NAME = re.compile(rf"{RECALL}-(?P<facts>\d+)-(?P<length>\d+)")
TEXT_ITEMS = 1000  # passages of last_word
TEXT_TOKENS = 400_000  # roughly what is read of a data set of the hub
TEXT_LENGTH = 512  # tokens of a window of "perplexity"


@dataclass(frozen=True)
class TaskSource:
    """A task and its items.

    Attributes:
        name: its name in lm-eval, or "last_word", "perplexity", "perplexity-<length>" or
            "recall-<facts>-<length>".
        rows: the items in the columns of the task's data set; None: lm-eval loads them from the
            hub. For a perplexity task rows are documents, ``{"text": ...}``.
        digest: of the rows or cases, or "hub".
        cases: questions of a recall task, which has no rows; else empty.
    """

    name: str
    rows: tuple[dict[str, Any], ...] | None
    digest: str
    cases: tuple[RecallCase, ...] = ()

    def settings(self, limit: int | None) -> dict[str, Any]:
        """What identifies its results, with so many items of it."""
        return {"name": self.name, "data": self.digest, "limit": limit}


def task_names(asked: str) -> tuple[str, ...]:
    """Names of tasks separated by commas; "paper" stands for its five, "lambada" for lm-eval's.

    Raises:
        EvaluationError: no name.
    """
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names:
        raise EvaluationError("--tasks is paper, or names of tasks separated by commas")
    found = [task for name in names for task in SETS.get(name, (name,))]
    return tuple(dict.fromkeys(found))


def task_sources(
    names: Sequence[str], data: Path | None = None, text: str | None = None, seed: int = 0
) -> list[TaskSource]:
    """Find the items of every task.

    Args:
        names: from `task_names`; "recall" is left to `recall_sources`.
        data: a folder with ``<task>.jsonl``, one item a line in the columns of the task's data
            set on the hub (BoolQ's of google/boolq, or of SuperGLUE); None: the hub.
        text: a plain text, a ``.jsonl`` or a data set of the hub (see `load_texts`) for the tasks
            "last_word" and "perplexity", with or without a length.
        seed: which passages of the text are used.

    Raises:
        EvaluationError: a file is missing or cannot be read, or a task needs ``text``.
        CalibrationError: from `load_texts`.
    """
    sources = []
    read: dict[int, list[str]] = {}  # by length: what a task gets depends on no other task
    for name in names:
        if name == RECALL:
            continue
        rows: list[dict[str, Any]] | None = None
        if name == LAST_WORD or text_length(name) is not None:
            if text is None:
                raise EvaluationError(f"the task {name} needs a text: --text FILE")
            length = text_length(name) or 1
            if length not in read:
                read[length] = load_texts(text, tokens=TEXT_TOKENS, length=length, seed=seed)
            rows = [{"text": document} for document in read[length]]
            if name == LAST_WORD:
                rows = [*last_word_items(read[length], count=TEXT_ITEMS, seed=seed)]
            if not rows:
                raise EvaluationError(
                    f"{text} has no passage for {name}: it needs paragraphs of 30 words or more"
                )
        elif data is not None:
            rows = _read(_file(data, name))
        if rows is None:
            sources.append(TaskSource(name, None, "hub"))
        else:
            found = digest(json.dumps(rows, sort_keys=True, ensure_ascii=False))
            sources.append(TaskSource(name, tuple(rows), found))
    return sources


def recall_name(facts: int, length: int) -> str:
    """Name of the recall task with so many facts in texts of so many tokens."""
    return f"{RECALL}-{facts}-{length}"


def facts_and_length(task: str) -> tuple[int, int] | None:
    """The facts and tokens of a recall task, by its name; None for other tasks."""
    found = _RECALL_NAME.fullmatch(task)
    return None if found is None else (int(found["facts"]), int(found["length"]))


def text_length(task: str) -> int | None:
    """Tokens of a window of a perplexity task, by its name; None for other tasks."""
    found = _TEXT_NAME.fullmatch(task)
    return None if found is None else int(found["length"] or TEXT_LENGTH)


def require_text_length(task: str, most: int | None) -> None:
    """Refuse a perplexity task whose windows are longer than the ``most`` tokens a model reads.

    Windows of the usual length are shortened instead.

    Raises:
        EvaluationError: names the task.
    """
    length = text_length(task)
    if length is not None and most is not None and length > most and length != TEXT_LENGTH:
        raise EvaluationError(
            f"the task {task} needs windows of {length} tokens, the model reads at most {most}: "
            "name a shorter length"
        )


def _file(folder: Path, name: str) -> Path:
    """The file of a task; LAMBADA's may be called lambada.jsonl."""
    names = [name] + [short for short, tasks in SETS.items() if tasks == (name,)]
    for candidate in names:
        if (path := folder / f"{candidate}.jsonl").is_file():
            return path
    raise EvaluationError(
        f"no items for {name}: {folder / name}.jsonl is missing; without --data they come from "
        "the hub"
    )


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        # only a newline ends a line: others may stand in a text as they are
        lines = read_whole(path, MOST_BYTES).decode("utf-8-sig").split("\n")
        rows = [parse_json(line) for line in lines if line.strip()]
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise EvaluationError(f"cannot read {path}: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EvaluationError(f"{path} holds no items: it needs one JSON object per line")
    return rows
