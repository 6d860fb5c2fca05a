"""Files of an evaluation: one result per comparator and task, each written whole or not at all.

An output folder holds::

    <comparator>/<task>.json    a result, written in one step when it is complete
    results.json                the table of the last run (see `table`)
    table.md                    the same for people

No file holds a time or a text, so two runs with the same settings write the same bytes. A result::

    {"schema_version": 1,
     "checksum": SHA-256 of the canonical JSON (sorted keys, no spaces) of all the rest,
     "settings": {                     what identifies it; of another run: refused, of another task
                                       or comparator: measured anew
       "run": {"model": str, "engine": "transformers" or "vllm", "weights": digest, "dtype": str,
               "device": "cpu" or "cuda", "batch_size": int, "seed": int,
               "versions": {package: version}},     with vLLM also "tensor_parallel": int
       "task": {"name": str, "data": digest or "hub", "limit": int or null},
       "comparator": {"name": str,
                      "asked": {...},     what it was prepared with; {} for mha
                      "settings": {...}}  of `Comparator.settings`
     },
     "source": str,                    where the method is defined
     "kind": "choice" (multiple choice), "continuation" (last words), "text" (perplexity) or
             "recall" (facts hidden in a text),
     "kv_share": {"length": tokens of the task's mean request, "share": of MHA's K,V bytes,
                  "long_length": min(2048, the model's maximum), "long_share": the share there},
     "items": [{"doc": int, "digest": str, "gold": int or null, "chosen": int or null,
                "chosen_norm": int or null, "loglikelihoods": [float, ...], "acc": float or null,
                "acc_norm": float or null, "nll": float, "tokens": int}, ...],
                                       fields of `Item`; one log-likelihood per choice
     "metrics": {"acc": float, ...}}   as lm-eval aggregates them
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chai_attention.atomic_write import require_folder
from chai_attention.errors import EvaluationError
from chai_attention.integrations.lm_eval.items import KINDS, Item
from chai_attention.results import as_json, from_json, require_same, verified, write_result
from chai_attention.strict_json import load_json

SCHEMA_VERSION = 1
TABLES = ("results.json", "table.md")
TRANSFORMERS = "transformers"  # the engine of results that name none
Redo = Callable[[Path, str], None]
_SETTINGS = ("run", "task", "comparator")
_BEFORE = {"engine": TRANSFORMERS}  # what runs did not say when there was one engine


@dataclass(frozen=True)
class Result:
    """What one comparator got in one task; the fields of its file."""

    settings: Mapping[str, Any]
    source: str
    kind: str
    kv_share: Mapping[str, float]
    items: tuple[Item, ...]
    metrics: Mapping[str, float]

    @property
    def comparator(self) -> str:
        """The comparator's name."""
        return str(self.settings["comparator"]["name"])

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.settings["task"]["name"])


class RunFolder:
    """The results in a folder.

    Args:
        path: the folder, made if need be.
        on_redo: called with a file and the reason when a file that is there cannot be used.

    Raises:
        EvaluationError: the folder cannot be made or written to.
    """

    def __init__(self, path: Path, on_redo: Redo = lambda path, reason: None):
        self.path = path
        self._on_redo = on_redo
        require_folder(path, EvaluationError, TABLES)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"cannot write to {path}: {error.strerror}") from error

    def require_run(self, run: Mapping[str, Any]) -> None:
        """Refuse a folder whose results are of another run, which would be written over.

        Files that are no results are left to `get`.

        Raises:
            EvaluationError: names what differs.
        """
        wanted = {**_BEFORE, **as_json(run, EvaluationError)}
        for path in sorted(self.path.glob("*/*.json")):
            try:
                found = {**_BEFORE, **load_result(path).settings["run"]}
            except EvaluationError:
                continue
            require_same(path, found, wanted, EvaluationError)

    def get(
        self,
        run: Mapping[str, Any],
        task: Mapping[str, Any],
        comparator: Mapping[str, Any],
    ) -> Result | None:
        """Return the result with these settings; None if it has to be measured.

        Args:
            run: settings of the run.
            task: settings of the task.
            comparator: name and what it was asked for; its own settings too, where it is prepared.
        """
        path = self._file(comparator["name"], task["name"])
        if not os.path.lexists(path):
            return None
        try:
            result = load_result(path)
        except EvaluationError as error:
            self._on_redo(path, str(error))
            return None
        for name, wanted in zip(_SETTINGS, (run, task, comparator), strict=True):
            found = {**(_BEFORE if name == "run" else {}), **result.settings[name]}
            for key, value in as_json(wanted, EvaluationError).items():
                if found.get(key) != value:
                    self._on_redo(path, f"it is of another {name} ({key} differs)")
                    return None
        return result

    def put(self, result: Result) -> None:
        """Write a result, whole or not at all.

        Raises:
            EvaluationError: the file cannot be written.
        """
        path = self._file(result.comparator, result.task)
        body = {"schema_version": SCHEMA_VERSION, **asdict(result)}
        write_result(path, body, EvaluationError, make_folder=True)

    def _file(self, comparator: str, task: str) -> Path:
        safe = (re.sub(r"[^\w.+-]", "_", name) for name in (comparator, task))
        folder, name = safe
        return self.path / folder / f"{name}.json"


def load_result(path: Path) -> Result:
    """Read one result.

    Raises:
        EvaluationError: it cannot be read, is damaged, or was written by another release.
    """
    try:
        body = verified(load_json(path), SCHEMA_VERSION, signed=True)
        result = from_json(Result, body)
        if result.kind not in KINDS:
            raise EvaluationError(f"its kind is {result.kind!r}")
        if not result.items or not all(item.loglikelihoods for item in result.items):
            raise ValueError("it has no items, or one has no likelihood")
        if not all(isinstance(result.settings[name], dict) for name in _SETTINGS):
            raise ValueError("it has no settings")
    except OSError as error:
        raise EvaluationError(f"cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"it is damaged ({type(error).__name__}: {error})") from error
    return result
