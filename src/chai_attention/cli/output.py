"""What a command prints on standard output: tables for a person, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer


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


def note(text: str) -> None:
    """Tell something on standard error that matters whatever is printed."""
    typer.echo(text, err=True)
