"""One self-contained HTML page from result files, which opens offline, prints and fits a phone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from chai_attention.atomic_write import require_file, require_other, write_whole
from chai_attention.reports.answer import MEASURED_BY
from chai_attention.reports.drawing import require_matplotlib
from chai_attention.reports.frontier import frontier_plot
from chai_attention.reports.result_files import (
    BROKEN,
    Skipped,
    broken,
    files_of,
    load_frontiers,
    load_sections,
)
from chai_attention.reports.sections import ReportError, Section


def render_page(sections: Sequence[Section], title: str) -> str:
    """Return the page as HTML with all styles, scripts and data inside.

    Args:
        sections: in order; not empty.
        title: of the page.
    """
    environment = Environment(
        loader=PackageLoader("chai_attention.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html").render(
        title=title,
        sections=sections,
        measured_by=MEASURED_BY,
        answers=answers_of(sections),
        release=version("chai-attention"),
    )


def answers_of(sections: Sequence[Section]) -> dict[str, list[tuple[str, int]]]:
    """Sentences about savings, costs and gains, each with the number of its section from 1."""
    return {
        kind: [
            (text, number)
            for number, section in enumerate(sections, start=1)
            for found, text in section.answer
            if found == kind
        ]
        for kind in MEASURED_BY
    }


def write_page(
    runs: Sequence[Path],
    out: Path,
    title: str | None = None,
    on_skipped: Skipped = lambda path: None,
) -> Path:
    """Make a page of result files, or one picture of the frontiers among them.

    Args:
        runs: files and folders (see `load_sections`).
        out: where the page goes; written in one step. A picture, if it ends in .png or .svg.
        title: of the page or picture; None for its usual one.
        on_skipped: called with each file of a folder that is no result of a command.

    Raises:
        ReportError: a run cannot be used, or the page cannot be written, or would be written over
            one of the runs.
    """
    require_matplotlib()
    require_file(out, ReportError)
    require_other([out], files_of(runs), ReportError)
    if out.suffix in (".png", ".svg"):
        return frontier_plot(load_frontiers(runs), out, *([] if title is None else [title]))
    page = _rendered(load_sections(runs, on_skipped), title or "CHAI report")
    write_whole(out, page.encode(), ReportError)
    return out


def _rendered(sections: Sequence[Section], title: str) -> str:
    """The page; where a section cannot be shown, an error that names its file."""
    try:
        return render_page(sections, title)
    except (*BROKEN, TemplateError):
        for section in sections:
            try:
                render_page([section], title)
            except (*BROKEN, TemplateError) as error:
                raise ReportError(broken(section.source, error)) from error
        raise
