"""Strict JSON: finite numbers, unique keys, bounded size and depth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from chai_attention.atomic_write import read_whole

MOST_BYTES = 2**28  # of a file; profiles and results of the largest models have a tenth of that
MOST_DEPTH = 32
MOST_INT = 2**64


def load_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be read; ``strerror`` says why.
        ValueError: it is no JSON of the kind that `parse_json` takes.
    """
    return parse_json(read_whole(path, MOST_BYTES).decode("utf-8-sig"))


def parse_json(text: str) -> Any:
    """Parse JSON (RFC 8259) that has one meaning only and fits the numbers of a machine.

    Python's own reader also takes NaN and Infinity, makes infinity of 1e999, keeps the last of
    several equal keys, and accepts what is nested too deeply for a recursive function.

    Raises:
        ValueError: it is not JSON; a number that is not finite, or a whole one of 2^64 or more; a
            key that is there twice; more than 32 lists and objects in each other; half a surrogate
            pair, which no file can hold.
    """
    try:
        data = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check(data)
    return data


_TOO_DEEP = f"more than {MOST_DEPTH} lists and objects in each other"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {_short(text)} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > 21 or abs(value := int(text)) >= MOST_INT:
        raise ValueError(f"the number {_short(text)} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {_short(name)!r} is there twice")
        found[name] = value
    return found


def _check(data: Any) -> None:
    """Refuse what is nested too deeply or cannot be written again; level by level, no recursion."""
    level = _containers([data])
    for _ in range(MOST_DEPTH):
        if not level:
            return
        below: list[list[Any] | dict[str, Any]] = []
        for item in level:
            if isinstance(item, dict):
                _containers(item)
                below += _containers(item.values())
            else:
                below += _containers(item)
        level = below
    if level:
        raise ValueError(_TOO_DEEP)


def _containers(items: Iterable[Any]) -> list[list[Any] | dict[str, Any]]:
    """The lists and objects among ``items``; texts are checked on the way."""
    found = []
    for item in items:
        if isinstance(item, str):
            _encodable(item)
        elif isinstance(item, (list, dict)):
            found.append(item)
    return found


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half a surrogate pair") from None


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
