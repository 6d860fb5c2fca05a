"""What a command prints on standard output: tables for a person, or one JSON object."""

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
    """Where results go.

    Attributes:
        as_json: as one JSON object, and nothing else.
        quiet: tables are left out.
    """

    as_json: bool = False
    quiet: bool = False

    def say(self, text: str | Callable[[], str], *, nl: bool = True) -> None:
        """Print something for a person: text, or what makes it."""
        if not (self.as_json or self.quiet):
            typer.echo(text if isinstance(text, str) else text(), nl=nl)

    def give(self, data: Callable[[], Any]) -> None:
        """Print the results for a program."""
        if self.as_json:
            typer.echo(json.dumps(data(), indent=1, allow_nan=False))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Show the library's warnings as a line each, as soon as they come."""
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
    """Tell something on standard error that matters whatever is printed."""
    typer.echo(text, err=True)
