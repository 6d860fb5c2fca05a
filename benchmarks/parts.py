"""Parts of a benchmark, in one result file that is up to date after each of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chai_attention.errors import ChaiError
from chai_attention.results import as_json, read_result, require_same, verified, write_result

SCHEMA_VERSION = 1
REMEDY = "move it away to measure anew"


class Parts:
    """What was measured so far; a run goes on with the file of an earlier one.

    Attributes:
        found: "about", and parts by name.

    Args:
        file: JSON with a schema version and a checksum, made with the first part.
        about: what all parts have in common.

    Raises:
        ChaiError: the file is damaged, or about something else.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]):
        self.file = file
        self.found: dict[str, Any] = {"about": as_json(about, ChaiError)}
        if file.is_file():
            kept = load_parts(file)
            require_same(file, kept.get("about", {}), self.found["about"], ChaiError)
            self.found = kept

    def add(self, part: str, value: Any, within: str | None = None) -> None:
        """Keep a part, by itself or among those ``within`` another, and write the file."""
        parts = self.found if within is None else self.found.setdefault(within, {})
        parts[part] = value
        write_result(self.file, {"schema_version": SCHEMA_VERSION, **self.found}, ChaiError)


def load_parts(file: Path) -> dict[str, Any]:
    """The contents of a result file; those of earlier releases have no schema version.

    Raises:
        ChaiError: it cannot be read, or is damaged.
    """
    data = read_result(file, ChaiError, REMEDY)
    try:
        if "schema_version" not in data:
            data = {"schema_version": SCHEMA_VERSION, **data}
            data.pop("checksum", None)
        return verified(data, SCHEMA_VERSION)
    except (TypeError, ValueError) as error:
        raise ChaiError(f"{file} cannot be used ({error}): {REMEDY}") from error
