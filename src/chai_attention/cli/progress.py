"""Progress on standard error: a bar on a terminal, otherwise a line every half minute."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS = 30.0  # between two lines where there is no terminal


class Reporter:
    """Shows steps of work: `tell` of a step, or a call with (done, in all) of the current one."""

    def __init__(self, bar: Progress, title: str):
        self._bar = bar
        bar.add_task(title, total=None)
        (self._task,) = bar.tasks

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units of the current step are done."""
        self._bar.update(self._task.id, completed=done, total=total)

    def describe(self, title: str) -> None:
        """Begin the step ``title``, whose length is not known yet."""
        if title != self._task.description:
            self._bar.remove_task(self._task.id)
            self._bar.add_task(title, total=None)
            (self._task,) = self._bar.tasks

    def tell(self, what: str, done: int, total: int) -> None:
        """Begin or continue the step ``what``: a `chai_attention.progress.Progress`."""
        self.describe(what)
        self(done, total)

    @property
    def line(self) -> str:
        """The current step and its progress, in a line."""
        task = self._task
        count = "" if task.total is None else f" {task.completed:.0f} of {task.total:.0f}"
        return f"{task.description}:{count} after {task.elapsed or 0:.0f} s"


@contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Reporter]:
    """Show progress while the block runs.

    Args:
        title: of the first step.
        quiet: show nothing.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),  # it names files, which may have brackets
        BarColumn(),
        _Counted(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    terminal = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet or not terminal) as bar:
        reporter = Reporter(bar, title)
        with _lines(reporter, off=quiet or terminal):
            yield reporter


def import_libraries(*, quiet: bool = False) -> None:
    """Import torch and transformers, which takes seconds, from a cold disk many."""
    with progress_bar("loading libraries", quiet=quiet):
        import_module("chai_attention.integrations.transformers.loading")


class _Counted(MofNCompleteColumn):
    """Units done of all units; empty while their number is unknown."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


@contextmanager
def _lines(reporter: Reporter, *, off: bool) -> Iterator[None]:
    """Print a line every half minute, also while no progress is reported."""
    if off:
        yield
        return
    over = threading.Event()

    def tell() -> None:
        while not over.wait(SECONDS):
            print(reporter.line, file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
