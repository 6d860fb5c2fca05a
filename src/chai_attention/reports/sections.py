"""Sections of a page: their facts, tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from rich.table import Table

from chai_attention.errors import ChaiError
from chai_attention.evaluation.points import Point
from chai_attention.profile import ClusterProfile
from chai_attention.reports.drawing import Key, Panel, panel_svg

MOST_ROWS = 6  # of a table that stands open on a page


class ReportError(ChaiError):
    """A report cannot be made of what was given."""


@dataclass(frozen=True)
class Grid:
    """A table. ``breaks`` are the rows behind which a line is drawn."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    breaks: frozenset[int] = frozenset()

    @property
    def folded(self) -> bool:
        """Whether it is too long to stand open on a page."""
        return len(self.rows) > MOST_ROWS


@dataclass(frozen=True)
class Charts:
    """Panels under one heading, with one legend and a note."""

    title: str
    panels: Sequence[Panel]
    note: str = ""

    def drawn(self) -> tuple[list[tuple[Panel, Markup, list[Key]]], list[Key]]:
        """Every panel with its SVG and the legend of its own, and the legend of all."""
        found, legend = [], {}
        for panel in self.panels:
            svg, keys = panel_svg(panel)
            found.append((panel, svg, keys if panel.own_legend else []))
            if not panel.own_legend:
                legend.update({key.name: key for key in keys})
        return found, [*legend.values()]


@dataclass(frozen=True)
class Section:
    """One run.

    Attributes:
        kind: in a word or two, such as "frontier".
        title: its heading.
        source: the file it comes from.
        facts: what was run, on what.
        answer: what it says of savings, costs and gains, for the top of the page.
        summary: what to know before the figures; warnings too.
        charts: groups of charts.
        tables: tables.
        explorer: data of the head-similarity explorer, None without one.
        profile: whose memberships explorers of the same model offer too.
        points: of a frontier, for a picture of several.
    """

    kind: str
    title: str
    source: str
    facts: Sequence[tuple[str, str]]
    answer: Sequence[tuple[str, str]] = ()
    summary: Sequence[str] = ()
    charts: Sequence[Charts] = ()
    tables: Sequence[Grid] = ()
    explorer: Mapping[str, Any] | None = field(default=None, repr=False)
    profile: ClusterProfile | None = field(default=None, repr=False)
    points: Sequence[Point] = field(default=(), repr=False)


def grid_of(table: Table, title: str | None = None) -> Grid:
    """A table of the command line as one of the page: the same figures and notes."""
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    return Grid(
        title=str(table.title or "") if title is None else title,
        header=[str(column.header).replace("\n", " ") for column in table.columns],
        rows=[[str(cell) for cell in row] for row in rows],
        note=str(table.caption or ""),
        breaks=frozenset(i for i, row in enumerate(table.rows[:-1]) if row.end_section),
    )


def words(value: Any) -> str:
    """A value of a file, which may hold others."""
    if isinstance(value, Mapping):
        return f"({', '.join(f'{name} {words(part)}' for name, part in value.items())})"
    return ", ".join(map(words, value)) if isinstance(value, list | tuple) else str(value)


def machine_facts(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Hardware and releases of what ``chai bench`` calls the machine."""
    hardware = [str(machine[name]) for name in ("gpu", "processor") if machine.get(name)]
    if "cores" in machine:
        hardware.append(f"{machine['cores']} cores, {machine.get('threads', '?')} threads")
    if "gpu_memory" in machine:
        hardware.append(f"{machine['gpu_memory'] / 2**30:.0f} GiB of GPU memory")
    releases = ("torch", "transformers", "triton", "cuda", "python", "driver_version")
    versions = [
        f"{name.removesuffix('_version')} {machine[name]}" for name in releases if name in machine
    ]
    return [
        ("hardware", "; ".join(hardware)),
        ("versions", ", ".join(versions)),
        *((("system", str(machine["system"])),) if "system" in machine else ()),
    ]
