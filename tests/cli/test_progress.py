"""Progress, with a terminal and without."""

import io
import re
import threading
import time

import pytest
from rich.console import Console

from chai_attention.cli import progress
from chai_attention.cli.progress import progress_bar
from chai_attention.cli.tables import render

NAMED = "reading [bold]a[/].txt [/red] :smile:"


@pytest.fixture
def terminal(monkeypatch):
    """A terminal, and what is shown on it."""
    shown = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=200)
    )
    return shown


def _seen(text):
    """Without the codes of a terminal."""
    return re.sub("\x1b[^a-zA-Z]*[a-zA-Z]", "", text)


def test_a_bar_shows_names_with_brackets_as_they_are(terminal):
    with progress_bar("loading [x]") as bar:
        bar.tell(NAMED, 3, 8)
    assert "loading [x]" in _seen(terminal.getvalue())
    assert NAMED in _seen(terminal.getvalue())
    assert "3/8" in _seen(terminal.getvalue())


def test_a_new_piece_of_work_begins_without_the_count_of_the_last(terminal):
    with progress_bar("a") as bar:
        bar(8, 8)
        bar.describe("b")
        assert bar.line.startswith("b: after")
        bar(1, 3)
        assert bar.line.startswith("b: 1 of 3 after")


def test_without_a_terminal_a_line_is_printed_now_and_then(monkeypatch, capsys):
    told, wait = [], threading.Event.wait

    def tick(event, seconds=None):
        if seconds is None or seconds != progress.SECONDS:
            return wait(event, seconds)
        told.append(seconds)
        return wait(event, 0.01)

    monkeypatch.setattr(progress.threading.Event, "wait", tick)
    with progress_bar(NAMED) as bar:
        bar(2, 9)
        while len(told) < 3:
            time.sleep(0.01)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"{NAMED}: 2 of 9 after 0 s"
    assert progress.SECONDS <= 60


def test_quiet_shows_nothing(terminal, capsys):
    with progress_bar("a", quiet=True) as bar:
        bar.tell("b", 1, 2)
    assert terminal.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_tables_show_brackets_and_codes_of_others_as_they_are():
    from rich.table import Table

    table = Table(title=NAMED)
    table.add_column("a column that is wide enough for the title")
    table.add_column("[/col]")
    table.add_row("wide enough for the title", "[red]x[/red] [/nothing] :smile:")
    shown = render(table, width=200)
    for text in (NAMED, "[/col]", "[red]x[/red] [/nothing] :smile:"):
        assert text in shown
