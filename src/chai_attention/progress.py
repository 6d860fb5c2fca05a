"""Progress callbacks: functions called with (name of the step, units done, units in all)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # with (what is going on, done, in all)
Report = Callable[[int, int], None]  # with (done, in all)


def quiet(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def silent(done: int, total: int) -> None:
    """Tell nobody."""
