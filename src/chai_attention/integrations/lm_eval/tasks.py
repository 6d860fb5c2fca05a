"""lm-eval's own task definitions, with their items from memory instead of the hub."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from chai_attention.errors import EvaluationError

SPLIT = "validation"
# folders of the tasks that are asked for most: indexing all of lm-eval takes 10 s
_FOLDERS = {
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "boolq": "super_glue/boolq",
    "lambada_openai": "lambada",
}
TYPES = ("multiple_choice", "loglikelihood")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's log and the bars of datasets inside a ``with`` block; errors remain."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def load_task(name: str, rows: Sequence[Mapping[str, Any]] | None, base: str | None = None) -> Task:
    """Build one of lm-eval's tasks; prompt, choices, filters and metrics are lm-eval's.

    Args:
        name: of the task.
        rows: its items in the columns of its data set; all are used for evaluation. None: lm-eval
            loads its data set.
        base: lm-eval's name, where ``name`` is not one.

    Raises:
        EvaluationError: lm-eval has no such task, the items lack a column, or the task is
            neither multiple choice nor the log-likelihood of a continuation.
    """
    wanted = base or name
    with quiet():
        manager = _manager(wanted)
        if wanted not in manager.all_subtasks:
            raise EvaluationError(f"lm-eval has no task {wanted!r}: `lm_eval ls tasks` lists them")
        try:
            task = _build(manager, wanted, rows)
        except Exception as error:  # templates and hubs fail in a different way for each mistake
            where = "its data set" if rows is None else f"items with columns {sorted(rows[0])}"
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise EvaluationError(f"task {name} cannot use {where} ({reason})") from error
    if task.OUTPUT_TYPE not in TYPES:
        raise EvaluationError(
            f"task {wanted} is of type {task.OUTPUT_TYPE}: a table takes {' and '.join(TYPES)}; "
            "use lm_eval --model chai"
        )
    return task


def _manager(name: str) -> TaskManager:
    """An index of lm-eval's tasks with at least this one."""
    folder = _FOLDERS.get(name)
    root = Path(lm_eval.tasks.__file__).parent
    if folder is None or not (root / folder).is_dir():
        return TaskManager()
    return TaskManager(include_defaults=False, include_path=str(root / folder))


def _build(manager: TaskManager, name: str, rows: Sequence[Mapping[str, Any]] | None) -> Task:
    """A task by its own config; with rows, only where the items come from is overridden."""
    spec: dict[str, Any] = {"task": name}
    if rows is not None:
        items = [_with_label(row) if name == "boolq" else dict(row) for row in rows]
        spec |= {
            "custom_dataset": lambda **_: {SPLIT: datasets.Dataset.from_list(items)},
            "dataset_kwargs": None,
            "training_split": None,
            "validation_split": SPLIT,
            "test_split": None,
            "fewshot_split": None,
        }
    # a group is lm-eval's way to override settings of a task by name
    return manager.load({"group": "local", "task": [spec]})["tasks"][name]


def _with_label(row: Mapping[str, Any]) -> dict[str, Any]:
    """BoolQ's own column ``answer`` as the ``label`` of SuperGLUE, which lm-eval's task reads."""
    return {**row, "label": int(row["answer"])} if "label" not in row else dict(row)
