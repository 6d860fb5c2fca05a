"""Where reports go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chai_attention.benchmarking.cases import BenchmarkError
from chai_attention.reports.plots import require_matplotlib


def require_writable(out: Path | None, plot: Path | None) -> None:
    """Refuse, before anything is measured, files that could not be written afterwards.

    Raises:
        BenchmarkError: no such folder, or a folder in the file's place.
        ChaiError: a plot without matplotlib.
    """
    for path in (out, plot):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "it is a folder" if path.is_dir() else f"no folder {path.parent}"
            raise BenchmarkError(f"cannot write {path}: {what}")
    if plot is not None:
        require_matplotlib()


def write_report(report: Mapping[str, Any], path: Path) -> Path:
    """Write a report as JSON.

    Raises:
        BenchmarkError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror}") from error
    return path
