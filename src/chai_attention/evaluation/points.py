"""Points of a frontier, and the file that keeps them from run to run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chai_attention.errors import ChaiError
from chai_attention.strict_json import load_json
from chai_attention.whole_files import write_whole

SCHEMA_VERSION = 1


class FrontierError(ChaiError):
    """A frontier cannot be measured as asked, or its file cannot be used."""


@dataclass(frozen=True)
class Point:
    """What one calibration costs and saves on one text at one context length.

    Attributes:
        recipe: name of the recipe or profile.
        settings: what the name stands for: arguments of `calibrate`, or a profile's digest.
        asked: "save", a share of the K,V bytes, or "removed", a share of the heads; None for a
            ready profile.
        budget: the share that was asked for; None for a ready profile.
        text: name of the test text.
        digest: of its windows, so that another text of the same name is another point.
        context: tokens per test window.
        windows: test windows of that length.
        removed: share of all heads whose scores are not computed any more.
        saved: share of the K,V bytes of ``context`` tokens that is not held.
        at_least: whether ``saved`` is a bound, because every request chooses its own K heads.
        baseline: perplexity without clusters.
        rise: relative rise of perplexity.
        standard_error: of the rise, paired by windows.
        seconds: that calibration took; 0 for a ready profile.
    """

    recipe: str
    settings: Mapping[str, Any]
    asked: str | None
    budget: float | None
    text: str
    digest: str
    context: int
    windows: int
    removed: float
    saved: float
    at_least: bool
    baseline: float
    rise: float
    standard_error: float
    seconds: float

    @property
    def key(self) -> str:
        """What was asked, without what was found."""
        return key_of(
            self.recipe,
            self.settings,
            self.asked,
            self.budget,
            self.text,
            self.digest,
            self.context,
        )


def key_of(*asked: Any) -> str:
    """The key of a point from its recipe, settings, asked, budget, text, digest and context."""
    return json.dumps(asked, sort_keys=True)


class PointFile:
    """The points that were measured so far, written whenever one comes.

    Two runs at once into one file keep each other's points.

    Args:
        path: the JSON file, made with the first point; None keeps the points in memory only.
        about: what all its points have in common, such as the model and the calibration text.

    Raises:
        FrontierError: the file cannot be read, is none of ours, or is about something else.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]):
        self._path = path
        # as it will be read again: tuples become lists
        self._about: dict[str, Any] = json.loads(json.dumps(dict(about)))
        self._points: dict[str, Point] = {}
        self._read_in()

    def _read_in(self) -> None:
        """Take over the points of the file, which another run may have written meanwhile."""
        path = self._path
        if path is None or not os.path.lexists(path):
            return
        earlier, points = _read(path)
        differing = sorted(
            name for name in {*earlier, *self._about} if earlier.get(name) != self._about.get(name)
        )
        if differing:
            raise FrontierError(
                f"{path} was measured with another {', '.join(differing)}: "
                "write to another folder, or move it away"
            )
        self._points |= {point.key: point for point in points}

    def get(self, key: str) -> Point | None:
        """Return the point with this key if it was measured."""
        return self._points.get(key)

    def add(self, point: Point) -> None:
        """Keep a point; the file stays whole whatever happens while it is written.

        Raises:
            FrontierError: the file cannot be written, or another run made one about something else.
        """
        self._read_in()
        self._points[point.key] = point
        if self._path is None:
            return
        contents = {
            "schema_version": SCHEMA_VERSION,
            "about": self._about,
            "points": [asdict(p) for p in self._points.values()],
        }
        text = json.dumps(contents, indent=1, allow_nan=False) + "\n"
        write_whole(self._path, text.encode(), FrontierError)


def load_points(path: str | Path) -> list[Point]:
    """Read the points of a file that `frontier` wrote.

    Raises:
        FrontierError: the file cannot be read, or is none of ours.
    """
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[dict[str, Any], list[Point]]:
    """What a file is about, and its points."""
    try:
        data = load_json(path)
    except OSError as error:
        raise FrontierError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise FrontierError(
            f"{path} is damaged, not JSON ({error}): move it away to measure anew"
        ) from error
    try:
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"its schema version is {data['schema_version']!r}")
        return dict(data["about"]), [_point(item) for item in data["points"]]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise FrontierError(
            f"{path} is no file of frontier points of this release ({reason}): "
            "move it away to measure anew"
        ) from error


# what a field may be: a value of another kind is said here, not met somewhere in a table
_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("recipe", "text", "digest"), (str,)),
    "settings": (dict,),
    "asked": (str, type(None)),
    "budget": (*_NUMBER, type(None)),
    **dict.fromkeys(("context", "windows"), (int,)),
    "at_least": (bool,),
    **dict.fromkeys(("removed", "saved", "baseline", "rise", "standard_error", "seconds"), _NUMBER),
}


def _point(item: Any) -> Point:
    """One point of a file, or a TypeError that says what is wrong with it."""
    if not isinstance(item, dict) or set(item) != set(_KINDS):
        raise TypeError("a point has other fields")
    for name, kinds in _KINDS.items():
        value = item[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{name} of a point is {value!r}")
    return Point(**item)
