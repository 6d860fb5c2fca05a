"""Result files of all commands: JSON with schema version and checksum; interrupted runs resume.

A file is ``{"checksum": SHA-256 of the canonical JSON of all the rest, "schema_version": ...}`` and
more. Files of earlier releases that have no checksum are read as they are. What tells two inputs
apart (texts, weights, profiles) is a `digest`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin, get_type_hints

from chai_attention.atomic_write import write_whole
from chai_attention.errors import ChaiError
from chai_attention.strict_json import load_json

Row = TypeVar("Row")
_CHECKSUM = "checksum"


def digest(*parts: Any, digits: int = 16) -> str:
    """The first hexadecimal digits of the SHA-256 of bytes, texts and tensors (not bfloat16)."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode())
        elif isinstance(part, bytes):
            found.update(part)
        else:
            found.update(part.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:digits]


def file_digest(path: str | Path, digits: int = 64) -> str | None:
    """The same of a file, whatever its size; None for what is none.

    Raises:
        OSError: it cannot be read.
    """
    if not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:digits]


def write_result(
    path: Path,
    body: Mapping[str, Any],
    error: type[ChaiError],
    *,
    make_folder: bool = False,
    indent: int | None = 1,
) -> Path:
    """Write a result with its checksum, whole or not at all.

    Raises:
        ChaiError: ``error``, if the file cannot be written, or holds what JSON has no word for.
    """
    whole = as_json(body, error)
    whole = {_CHECKSUM: _checksum(whole), **whole}
    write_whole(
        path, (json.dumps(whole, indent=indent) + "\n").encode(), error, make_folder=make_folder
    )
    return path


def read_result(path: Path, error: type[ChaiError], remedy: str) -> Any:
    """Read a result, or whatever JSON is there; `verified` looks into it.

    Raises:
        ChaiError: ``error``, if it cannot be read, or is no JSON; the text ends with ``remedy``.
    """
    try:
        return load_json(path)
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}") from reason
    except ValueError as reason:
        raise error(f"{path} is damaged, not JSON ({reason}): {remedy}") from reason


def verified(data: Any, version: int, *, signed: bool = False) -> dict[str, Any]:
    """A result's contents, without version and checksum, which it must have if ``signed``.

    Raises:
        ValueError: they do not match the checksum, or are of another release.
        KeyError: there is no version.
        TypeError: it is no JSON object.
    """
    if not isinstance(data, dict):
        raise TypeError(f"it holds a {type(data).__name__}")
    body = dict(data)
    checksum = body.pop(_CHECKSUM, None)
    if (signed or checksum is not None) and checksum != _checksum(body):
        raise ValueError("its contents do not match its checksum")
    if body.pop("schema_version") != version:
        raise ValueError(f"its schema version is {data['schema_version']!r}")
    return body


def problem_of(error: Exception) -> str:
    """What an error says of a file's contents; a KeyError says only the key."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def require_same(
    path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], error: type[ChaiError]
) -> None:
    """Refuse to go on with a result that is about something else.

    Raises:
        ChaiError: ``error``, which names what differs.
    """
    differing = sorted(
        name for name in {*found, *wanted} if found.get(name) != wanted.get(name)
    )  # fmt: skip
    if differing:
        raise error(
            f"{path} was measured with another {', '.join(differing)}: "
            "write to another folder, or move it away"
        )


def as_json(value: Any, error: type[ChaiError]) -> Any:
    """A value as it will be read again: tuples become lists.

    Raises:
        ChaiError: ``error``, for a number that JSON has no word for.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as reason:
        raise error(f"a result cannot be kept as JSON: {reason}") from reason


def from_json(kind: type[Row], item: Any, of: str = "") -> Row:
    """A dataclass from the JSON of its fields: a value of another kind is said here.

    Args:
        kind: whose fields are numbers, texts, lists, other dataclasses, or None.
        item: from a file.
        of: behind the name of a field, in messages.

    Raises:
        TypeError: other fields, or a value of another kind.
    """
    hints = get_type_hints(kind)
    if not isinstance(item, dict) or set(item) != set(hints):
        raise TypeError(f"{kind.__name__} has other fields")
    return kind(**{name: _value(hints[name], item[name], name + of) for name in hints})


def _value(hint: Any, value: Any, name: str, verb: str = "is") -> Any:
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin is UnionType:  # something, or None
        return None if value is None else _value(parts[0], value, name, verb)
    if isinstance(origin, type) and is_dataclass(origin):
        return from_json(origin, value)
    kinds: Any = {float: (int, float), tuple: list, Mapping: dict}.get(origin, origin)
    if not isinstance(value, kinds) or (isinstance(value, bool) and origin is not bool):
        raise TypeError(f"{name} {verb} {value!r}")
    if origin in (list, tuple):
        return origin(_value(parts[0], part, name, "holds") for part in value)
    return value


class RowFile(Generic[Row]):
    """Rows that were measured so far, in a file that is written whenever one comes.

    Two runs at once into one file keep each other's rows.

    Args:
        path: the JSON file, made with the first row; None keeps the rows in memory only.
        about: what all its rows have in common, such as the model and the calibration text.

    Raises:
        ChaiError: `error`, if the file cannot be read, is none of ours, or is about something else.
    """

    version: ClassVar[int] = 1
    error: ClassVar[type[ChaiError]] = ChaiError
    rows: ClassVar[str] = "rows"
    what: ClassVar[str] = "results"

    def __init__(self, path: Path | None, about: Mapping[str, Any]):
        self._path = path
        self._about: dict[str, Any] = as_json(about, self.error)
        self._found: dict[str, Row] = {}
        self._read_in()

    @classmethod
    def key_of(cls, row: Row) -> str:
        """What tells a row from the others: what was asked, without what was found."""
        raise NotImplementedError

    @classmethod
    def parse(cls, item: Any) -> Row:
        """A row from its JSON; TypeError or ValueError if it is none."""
        return item

    @classmethod
    def plain(cls, row: Row) -> Any:
        """A row as JSON."""
        return row

    @classmethod
    def load(cls, path: Path) -> tuple[dict[str, Any], list[Row]]:
        """What a file is about, and its rows.

        Raises:
            ChaiError: `error`, if it cannot be read, or is none of ours.
        """
        remedy = "move it away to measure anew"
        data = read_result(path, cls.error, remedy)
        try:
            body = verified(data, cls.version)
            return dict(body["about"]), [cls.parse(item) for item in body[cls.rows]]
        except (KeyError, TypeError, ValueError) as error:
            raise cls.error(
                f"{path} is no file of {cls.what} of this release ({problem_of(error)}): {remedy}"
            ) from error

    def get(self, key: str) -> Row | None:
        """The row with this key if it was measured."""
        return self._found.get(key)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._found.values())

    def add(self, row: Row) -> None:
        """Keep a row; the file stays whole whatever happens while it is written.

        Raises:
            ChaiError: `error`, if the file cannot be written, or another run made one about
                something else.
        """
        self._read_in()
        self._found[self.key_of(row)] = row
        if self._path is not None:
            rows = [self.plain(row) for row in self]
            body = {"schema_version": self.version, "about": self._about, self.rows: rows}
            write_result(self._path, body, self.error)

    def _read_in(self) -> None:
        """Take over the rows of the file, which another run may have written meanwhile."""
        if self._path is None or not os.path.lexists(self._path):
            return
        about, rows = self.load(self._path)
        require_same(self._path, about, self._about, self.error)
        self._found |= {self.key_of(row): row for row in rows}


def _checksum(body: Mapping[str, Any]) -> str:
    return digest(json.dumps(body, sort_keys=True, separators=(",", ":")), digits=64)
