"""Standard output of a command, tables or one JSON object, and its notes on standard error."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from chai_attention.errors import ChaiWarning


@dataclass(frozen=True)
class Output:
    """How results are printed.

    Attributes:
        as_json: as one JSON object, and nothing else.
        quiet: tables are left out.
    """

    as_json: bool = False
    quiet: bool = False

    def say(self, text: str | Callable[[], str], *, nl: bool = True) -> None:
        """Print text for a person, or the text that a function returns."""
        if not (self.as_json or self.quiet):
            typer.echo(text if isinstance(text, str) else text(), nl=nl)

    def give(self, data: Callable[[], Any]) -> None:
        """Print results as JSON, if that was asked for."""
        if self.as_json:
            typer.echo(json.dumps(data(), indent=1, allow_nan=False))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print each of the library's warnings in one line, immediately."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ChaiWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, ChaiWarning):
                note(f"warning: {' '.join(str(message).split())}")
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show
        yield


def note(text: str) -> None:
    """Print a line on standard error, also with ``--json`` and ``--quiet``."""
    typer.echo(text, err=True)
