"""``chai report``: one HTML page from result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chai_attention.cli import options


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Result files, or folders of them: of chai eval, frontier, bench --out and "
            "redundancy, and profiles. Other files in a folder are left out and named.",
        ),
    ],
    out: Annotated[
        Path,
        options.output(
            "Write the page here (HTML); if it ends in .svg or .png, one picture of the "
            "frontiers among RUN."
        ),
    ],
    title: Annotated[
        str | None, typer.Option(help="Heading of the page.", show_default="CHAI report")
    ] = None,
) -> None:
    """Show results on one page that opens offline: figures, plots, heads to explore."""
    from chai_attention.reports.page import write_page

    def skipped(path: Path) -> None:
        typer.echo(f"left out {path}: no result of a chai command of this release", err=True)

    path = write_page(runs, out, title, skipped)
    kind = "picture" if path.suffix in (".png", ".svg") else "page"
    typer.echo(f"{kind} written to {path} ({path.stat().st_size / 1e6:.1f} MB)")
