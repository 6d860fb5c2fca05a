"""Progress on standard error: a bar for a terminal, else a line now and then."""

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
    """Told what is going on, by (what, done, in all) or by (done, in all) of what it is."""

    def __init__(self, bar: Progress, title: str):
        self._bar = bar
        bar.add_task(title, total=None)
        (self._task,) = bar.tasks

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` is done."""
        self._bar.update(self._task.id, completed=done, total=total)

    def describe(self, title: str) -> None:
        """Show ``title`` as what is going on; how much there is of it is not known yet."""
        if title != self._task.description:
            self._bar.remove_task(self._task.id)
            self._bar.add_task(title, total=None)
            (self._task,) = self._bar.tasks

    def tell(self, what: str, done: int, total: int) -> None:
        """Show both: a `chai_attention.progress.Progress`."""
        self.describe(what)
        self(done, total)

    @property
    def line(self) -> str:
        """What is going on, in a line."""
        task = self._task
        count = "" if task.total is None else f" {task.completed:.0f} of {task.total:.0f}"
        return f"{task.description}:{count} after {task.elapsed or 0:.0f} s"


@contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Reporter]:
    """Show what is going on while the block runs.

    Args:
        title: of the work, until it is described anew.
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
    """Import torch and transformers, which takes seconds, or many from a cold disk."""
    with progress_bar("loading libraries", quiet=quiet):
        import_module("chai_attention.integrations.transformers.loading")


class _Counted(MofNCompleteColumn):
    """How much is done; nothing before anyone knows how much there is."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


@contextmanager
def _lines(reporter: Reporter, *, off: bool) -> Iterator[None]:
    """Print what is going on now and then, also when nothing is told for minutes."""
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
