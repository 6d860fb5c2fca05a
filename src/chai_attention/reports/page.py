"""One self-contained HTML page from result files: opens offline, prints, fits a phone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from chai_attention.reports.result_files import Skipped, load_sections
from chai_attention.reports.sections import Bars, ReportError, Section
from chai_attention.whole_files import write_whole


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
    environment.tests["bars"] = lambda group: isinstance(group, Bars)
    return environment.get_template("page.html").render(
        title=title, sections=sections, release=version("chai-attention")
    )


def write_page(
    runs: Sequence[Path],
    out: Path,
    title: str = "CHAI report",
    on_skipped: Skipped = lambda path: None,
) -> Path:
    """Make a page of result files.

    Args:
        runs: files and folders (see `load_sections`).
        out: where the page goes; written in one step.
        title: of the page.
        on_skipped: called with each file of a folder that is no result of a command.

    Raises:
        ReportError: a run cannot be used, or the page cannot be written.
    """
    if out.is_dir() or not out.parent.is_dir():
        reason = "it is a folder" if out.is_dir() else f"no folder {out.parent}"
        raise ReportError(f"cannot write {out}: {reason}")
    page = render_page(load_sections(runs, on_skipped), title)
    write_whole(out, page.encode(), ReportError)
    return out
