"""A progress bar for work that reports (done, in all)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Call it with (done, in all); `describe` renames the work."""

    def __init__(self, bar: Progress, title: str):
        self._bar = bar
        self._task = bar.add_task(title, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` is done."""
        self._bar.update(self._task, completed=done, total=total)

    def describe(self, title: str) -> None:
        """Show ``title`` as what is going on."""
        self._bar.update(self._task, description=title)


@contextmanager
def progress_bar(title: str) -> Iterator[Reporter]:
    """Show a bar on standard error while the block runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # a log file has no use for a bar, and would get its empty last line
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        yield Reporter(bar, title)
