"""``chai serve``: an OpenAI-compatible server with clustered heads, by vLLM."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from chai_attention.cli import options
from chai_attention.cli.output import Output

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve_command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="What `vllm serve` takes: a folder or a name.")
    ],
    profile: Annotated[
        str | None,
        typer.Option(help="A profile, or a published schedule; default: the one in MODEL."),
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Only print K,V capacity and expected gain; load nothing."),
    ] = False,
    gpu_memory: Annotated[
        float,
        typer.Option(
            help="With --estimate: memory of a GPU in GB.",
            min=1,
            max=1e6,
            callback=options.finite,
        ),
    ] = 80.0,
    as_json: options.Json = False,
) -> None:
    """Serve MODEL with clustered heads; all other options go to `vllm serve`."""
    if as_json and not estimate:
        raise typer.BadParameter("--json goes with --estimate: a server prints no results")
    if estimate:
        from chai_attention.cli.serving_table import serving_record, serving_table
        from chai_attention.integrations.transformers.loading import load_config
        from chai_attention.integrations.vllm.preflight import profile_path
        from chai_attention.integrations.vllm.weigh import estimate_config

        chosen = profile_path(model, profile)
        config = load_config(model)
        found = estimate_config(config, chosen, context.args, int(gpu_memory * 1e9))
        shown = Output(as_json)
        shown.give(lambda: serving_record(found))
        shown.say(lambda: serving_table(found))
        return
    from chai_attention.integrations.vllm.serving import vllm_command

    command = vllm_command(model, profile, context.args)
    os.execv(command[0], command)
