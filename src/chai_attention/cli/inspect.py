"""``chai inspect``: what is in a profile, as a table and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect_command(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A profile, or llama-7b or llama-33b.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Check the profile against this model and count its bytes."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write elbow curves and head similarity as PNG into this folder."),
    ] = None,
) -> None:
    """Show a profile: clusters per layer, errors, and the K,V bytes per token."""
    from chai_attention.cli.tables import profile_table, summary_line
    from chai_attention.profile import ClusterProfile

    profile = ClusterProfile.resolve(file)
    shape = None
    if model is not None:
        from chai_attention.integrations.transformers.loading import load_config
        from chai_attention.integrations.transformers.support import describe

        config = load_config(model)
        shape = describe(config)
        profile.check(shape)
    typer.echo(profile_table(profile, shape))
    if shape is not None:
        typer.echo(summary_line(profile, shape, 2) + " (16-bit)")
    else:
        typer.echo("K,V bytes depend on the model: add --model to see them")
    if plot is not None:
        from chai_attention.reports.plots import profile_plots

        for path in profile_plots(profile, plot):
            typer.echo(f"plot written to {path}")
