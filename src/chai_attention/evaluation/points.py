"""Points of a frontier, and the file that keeps them from run to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chai_attention.errors import ChaiError
from chai_attention.results import RowFile, from_json

SCHEMA_VERSION = 1
ASKED = ("recipe", "settings", "asked", "budget", "text", "digest", "context")


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


def key_of(*asked: Any) -> str:
    """The key of a point from its fields `ASKED`, in that order."""
    return json.dumps(asked, sort_keys=True)


class PointFile(RowFile[Point]):
    """The points of a frontier that were measured so far; see `RowFile`."""

    version, error, rows, what = SCHEMA_VERSION, FrontierError, "points", "frontier points"

    @classmethod
    def key_of(cls, row: Point) -> str:
        """What was asked."""
        return key_of(*(getattr(row, name) for name in ASKED))

    @classmethod
    def parse(cls, item: Any) -> Point:
        """One point of a file; a TypeError says what is wrong with it."""
        return from_json(Point, item, " of a point")

    @classmethod
    def plain(cls, row: Point) -> dict[str, Any]:
        """A point as JSON."""
        return asdict(row)


def load_points(path: str | Path) -> list[Point]:
    """Read the points of a file that `frontier` wrote.

    Raises:
        FrontierError: the file cannot be read, or is none of ours.
    """
    return PointFile.load(Path(path))[1]
