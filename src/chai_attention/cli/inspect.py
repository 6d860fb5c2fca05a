"""``chai inspect``: a profile as a table and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chai_attention.cli import options
from chai_attention.cli.output import Output
from chai_attention.cli.records import profile_record
from chai_attention.cli.tables import measured_lines, profile_table, summary_line
from chai_attention.profile import ClusterProfile
from chai_attention.reports.plots import PROFILE_PLOTS, profile_plots


def inspect_command(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A profile, or llama-7b or llama-33b.",
            autocompletion=options.complete_profile,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Check the profile against this model and count its bytes.",
            callback=options.known,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        options.output(
            "Write what each head does, elbow curves and head similarity as PNG into this folder.",
            *PROFILE_PLOTS,
        ),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Show a profile: clusters per layer, errors, the promise, and the K,V bytes per token."""
    shown = Output(as_json)
    profile = ClusterProfile.resolve(file)
    shape = None
    if model is not None:
        from chai_attention.runtime.shape import describe
        from chai_attention.runtime.skeleton import load_config

        shape = describe(load_config(model, trust_remote_code=trust_remote_code))
        profile.check(shape)
    # what cannot be drawn is told before anything is printed
    plots = [] if plot is None else profile_plots(profile, plot)
    shown.give(lambda: profile_record(profile, shape))
    shown.say(profile_table(profile, shape))
    if profile.promise is None:
        shown.say("no loss was measured for this profile: chai calibrate --max-loss does")
    for line in measured_lines(profile):
        shown.say(line)
    if shape is not None:
        shown.say(summary_line(profile, shape, 2))
    else:
        shown.say("K,V bytes depend on the model: add --model to see them")
    for path in plots:
        shown.say(f"plot written to {path}")
