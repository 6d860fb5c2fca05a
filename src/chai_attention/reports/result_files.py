"""Reads result files of all commands, which it recognises by their contents."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.errors import ConsoleError

from chai_attention.atomic_write import place_of
from chai_attention.benchmarking.attention import SCHEMA_VERSION as BENCH_VERSION
from chai_attention.errors import ChaiError
from chai_attention.evaluation.points import Point, load_points
from chai_attention.evaluation.redundancy_files import KIND as REDUNDANCY
from chai_attention.evaluation.redundancy_files import parse_redundancy
from chai_attention.evaluation.runs import SCHEMA_VERSION as EVAL_VERSION
from chai_attention.profile import ClusterProfile
from chai_attention.reports.page_bench import attention_section, model_section
from chai_attention.reports.page_profile import explorer_profile, profile_section
from chai_attention.reports.page_quality import (
    FRONTIER_OF,
    TESTED_ON,
    eval_section,
    frontier_section,
)
from chai_attention.reports.page_redundancy import redundancy_section
from chai_attention.reports.sections import ReportError, Section
from chai_attention.results import problem_of, read_result, verified

_COMMANDS = "chai calibrate, chai eval, chai frontier, chai bench --out or chai redundancy"

BENCHMARKS = {"attention": attention_section, "model": model_section}
Skipped = Callable[[Path], None]


class UnknownFileError(ReportError):
    """A file that is no result of a command."""


def load_sections(runs: Sequence[Path], on_skipped: Skipped = lambda path: None) -> list[Section]:
    """Read the results in files and folders, each file once.

    Args:
        runs: files, or folders, of which every ``.json`` directly inside is read.
        on_skipped: called with each file of a folder that is no result of a command.

    Returns:
        Sections in the order given, files of a folder by name.

    Raises:
        ReportError: nothing to show, a file that is damaged, or one that was named and is no
            result of a command in this release; the text names it.
    """
    sections: dict[str, Section] = {}
    for run in runs:
        paths = files_of([run])
        if not paths:
            raise ReportError(f"{run} holds no results (.json): give what {_COMMANDS} wrote")
        unknown = {}
        for path in paths:
            real = place_of(path)
            if real in sections:
                continue
            try:
                sections[real] = _section(path)
            except UnknownFileError as error:
                unknown[path] = error
        if len(unknown) == len(paths):
            raise next(iter(unknown.values()))
        for path in unknown:
            on_skipped(path)
    if not sections:
        raise ReportError(f"there is nothing to report: give what {_COMMANDS} wrote")
    return with_profiles(list(sections.values()))


def load_frontiers(runs: Sequence[Path]) -> dict[str, list[Point]]:
    """The points of all frontiers among files and folders, by the name of their model.

    Files of one model are told apart if they differ in how it was calibrated.

    Raises:
        ReportError: there is none, or one cannot be read.
    """
    found: dict[str, list[Point]] = {}
    sections = [section for section in load_sections(runs) if section.points]
    for section in sections:
        name = section.title
        alike = [_calibrated(other) for other in sections if other.title == name]
        if any(other != _calibrated(section) for other in alike):
            name += f" ({section.source})"
        found.setdefault(name.removeprefix(FRONTIER_OF), []).extend(section.points)
    if not found:
        raise ReportError("a picture is of frontiers: give what chai frontier wrote")
    return found


def _calibrated(section: Section) -> list[tuple[str, str]]:
    """What a frontier's file says of its model and calibration."""
    return [fact for fact in section.facts if fact[0] != TESTED_ON]


def with_profiles(sections: Sequence[Section]) -> list[Section]:
    """Let explorers of heads offer the memberships of profiles of the same model."""
    found = []
    for section in sections:
        if (explorer := section.explorer) is not None:
            layers = [info["layer"] for info in explorer["layers"]]
            made = [explorer_profile(other, explorer["heads"], layers) for other in sections]
            profiles = [one for one in made if one is not None]
            section = replace(section, explorer={**explorer, "profiles": profiles})
        found.append(section)
    return found


def files_of(runs: Sequence[Path]) -> list[Path]:
    """The files that `load_sections` reads."""
    folders = (sorted(run.glob("*.json")) if os.path.isdir(run) else [run] for run in runs)
    return [path for paths in folders for path in paths]


def broken(name: str | Path, error: Exception) -> str:
    """What to say of a file whose contents cannot be shown."""
    return f"{name} is damaged, or another release wrote it ({problem_of(error)}): make it again"


# what contents of another form end in: a report is made of whatever a file holds
BROKEN = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    StopIteration,
    ConsoleError,
)


def _section(path: Path) -> Section:
    data = read_result(path, ReportError, "make it again")
    source = f"{path.parent.name}/{path.name}" if path.parent.name else path.name
    try:
        return _made(data, path, source)
    except UnknownFileError:
        raise
    except ChaiError as error:
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise ReportError(named) from error
    except BROKEN as error:
        raise ReportError(broken(path, error)) from error


def _made(data: Any, path: Path, source: str) -> Section:
    """The section of a file's contents, by the keys that tell commands apart."""
    names = set(data) if isinstance(data, dict) else set()
    if {"clusters", "provenance"} <= names:
        return profile_section(ClusterProfile.load(path), source)
    version = data.get("schema_version") if names else None
    if names and data.get("kind") == REDUNDANCY:
        return redundancy_section(parse_redundancy(data, path), source)
    if {"about", "points"} <= names:
        return frontier_section(data["about"], load_points(path), source)
    if "benchmark" in names and data["benchmark"] in BENCHMARKS and version == BENCH_VERSION:
        return BENCHMARKS[data["benchmark"]](verified(data, BENCH_VERSION), source)
    if {"run", "tasks", "rows"} <= names and version == EVAL_VERSION:
        return eval_section(verified(data, EVAL_VERSION), source)
    if {"checksum", "settings", "items"} <= names:
        raise UnknownFileError(
            f"{path} is the result of one task: give the folder of chai eval, whose results.json "
            "compares them"
        )
    raise UnknownFileError(f"{path} is none of what {_COMMANDS} writes in this release")
