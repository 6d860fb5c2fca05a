"""``chai serve``: vLLM's OpenAI-compatible server with clustered heads."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from chai_attention.cli import options
from chai_attention.cli.output import Output

_WHOLE = "\0"  # in front of a word that the parser is to leave alone; no argument can hold it


class ServeCommand(TyperCommand):
    """Leaves vLLM's short options whole.

    To a parser of combined letters ``-sc.method`` is ``-s -c ... -h``, and asks for the help.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line."""
        joined = [w[:1] == "-" and w[:2] != "--" and len(w) > 2 for w in args]
        words = [_WHOLE * mark + word for mark, word in zip(joined, args, strict=True)]
        super().parse_args(ctx, words)
        for name, value in ctx.params.items():
            if isinstance(value, str):
                ctx.params[name] = value.removeprefix(_WHOLE)
        ctx.args = [word.removeprefix(_WHOLE) for word in ctx.args]
        return ctx.args


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve_command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="What `vllm serve` takes: a folder or a name.")
    ],
    profile: options.Profile = None,
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
    contexts: Annotated[
        list[int] | None,
        typer.Option(
            "--context",
            help="With --estimate: tokens of a request; repeatable.",
            min=1,
            max=10**9,
            show_default="2048, 8192 and 32768",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            help="With --estimate: requests at a time; tells whether they fit.",
            min=1,
            max=10**6,
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Serve MODEL with clustered heads; all other options go to `vllm serve`."""
    if model.startswith("-"):
        raise typer.BadParameter(f"MODEL comes first, before {model}")
    if as_json and not estimate:
        raise typer.BadParameter("--json goes with --estimate: a server prints no results")
    if not estimate and (contexts or requests):
        raise typer.BadParameter("--context and --requests go with --estimate")
    if estimate:
        from chai_attention.cli.serving_table import CONTEXTS, serving_record, serving_table
        from chai_attention.integrations.vllm.estimate import estimate_config
        from chai_attention.integrations.vllm.serve import profile_path
        from chai_attention.runtime.skeleton import load_config

        chosen = profile_path(model, profile)
        config = load_config(model)
        found = estimate_config(config, chosen, context.args, int(gpu_memory * 1e9))
        shown = Output(as_json)
        lengths = tuple(sorted(set(contexts))) if contexts else CONTEXTS
        shown.give(lambda: serving_record(found, lengths, requests))
        shown.say(lambda: serving_table(found, lengths, requests))
        return
    from chai_attention.integrations.vllm.serve import vllm_command

    command = vllm_command(model, profile, context.args)
    os.execv(command[0], command)
