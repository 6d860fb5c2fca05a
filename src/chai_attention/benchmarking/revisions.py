"""Run the same benchmark with the code of another git revision (``--base``)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chai_attention.benchmarking.cases import BenchmarkError
from chai_attention.strict_json import load_json

_MAIN = "from chai_attention.cli import main; raise SystemExit(main())"
# options of the run itself: the other one writes its figures where we read them
_OWN = ("--base", "--out", "--plot")
# what tells a row from the others, and the times in it
_KEYS = ("kind", "batch", "tokens", "dtype", "run", "clusters")
TIMES = ("us", "ttft_us", "tpot_us")


def resolve_revision(revision: str) -> tuple[Path, str]:
    """The repository that this code runs from, and a revision's hash.

    Raises:
        BenchmarkError: this code is no checkout, or there is no such revision.
    """
    here = Path(__file__).parent
    root = Path(_git(here, "rev-parse", "--show-toplevel", of="--base needs a git checkout"))
    if root / "src" not in here.parents:
        raise BenchmarkError(f"--base needs a git checkout: this code runs from {here.parent}")
    name = f"{revision}^{{commit}}"
    return root, _git(root, "rev-parse", "--verify", "--end-of-options", name,
                      of=f"there is no revision {revision!r}")  # fmt: skip


def run_revision(root: Path, commit: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a ``chai bench`` command with the code of a commit; what it would write with ``--out``.

    Args:
        root: the repository.
        commit: from `resolve_revision`.
        arguments: of the command line as they are; options about outputs are left out.

    Raises:
        BenchmarkError: that code cannot run it.
    """
    with TemporaryDirectory(prefix="chai-base-") as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "report.json"
        _git(root, "worktree", "add", "--detach", str(tree), commit, of="no worktree can be made")
        try:
            done = subprocess.run(
                [sys.executable, "-c", _MAIN, *_without(arguments), "--out", str(out)],
                env={**os.environ, "PYTHONPATH": str(tree / "src")},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode or not out.exists():
                last = done.stderr.strip().splitlines() or ["no figures"]
                raise BenchmarkError(f"revision {commit[:12]} cannot run this: {last[-1]}")
            report: dict[str, Any] = load_json(out)
            return report
        finally:
            _git(root, "worktree", "remove", "--force", str(tree), of="a worktree stays")


def compared(report: dict[str, Any], base: dict[str, Any]) -> list[dict[str, Any]]:
    """Times that both have: what of a row tells it from the others, "time", "before" and "now"."""
    others = {_key(row): row for row in base["results"]}
    return [
        {
            **{key: row[key] for key in _KEYS if key in row},
            "time": name,
            "before": others[_key(row)][name],
            "now": row[name],
        }
        for row in report["results"]
        for name in TIMES
        if row.get(name) and others.get(_key(row), {}).get(name)
    ]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEYS)


def _without(arguments: Sequence[str]) -> list[str]:
    """The arguments without options about outputs, and their values."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if not skip and name not in (*_OWN, "--json", "--quiet"):
            kept.append(argument)
        skip = not skip and name in _OWN and not equals
    return [*kept, "--quiet"]


def _git(folder: Path, *arguments: str, of: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise BenchmarkError(f"{of}: {told}") from error
    return done.stdout.strip()
