"""The output files of ``chai bench``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chai_attention.atomic_write import require_file, require_other
from chai_attention.benchmarking.cases import BenchmarkError
from chai_attention.results import write_result


def require_writable(out: Path | None, plot: Path | None) -> None:
    """Refuse, before anything is measured, files that could not be written afterwards.

    Raises:
        BenchmarkError: from `require_file`, or one file for both.
    """
    asked = [path for path in (out, plot) if path is not None]
    for path in asked:
        require_file(path, BenchmarkError)
    require_other(asked, (), BenchmarkError)


def write_report(report: Mapping[str, Any], path: Path) -> Path:
    """Write a report as JSON; a file that was there stays whole unless all is written.

    Raises:
        BenchmarkError: the file cannot be written.
    """
    return write_result(path, report, BenchmarkError)
