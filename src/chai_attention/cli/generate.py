"""``chai generate``: text from a prompt, with its times and the bytes of its cache."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from chai_attention.cli import options
from chai_attention.cli.output import Output
from chai_attention.cli.progress import progress_bar
from chai_attention.cli.records import written_record
from chai_attention.cli.tables import compared_line, generation_table
from chai_attention.errors import LoadError, ProfileError
from chai_attention.profile import ClusterProfile
from chai_attention.profile_files import EXPORTED, holds_export

if TYPE_CHECKING:
    from chai_attention.integrations.transformers.timed_generation import Written

_PLAIN, _CLUSTERED = "full model", "CHAI"


def generate_command(
    model: options.Model,
    profile: options.Profile = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What the model goes on from; - for standard input.",
            show_default="what is piped in",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=1)] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    temperature: Annotated[
        float,
        typer.Option(help="0 is greedy; higher is more varied.", min=0, callback=options.finite),
    ] = 0.0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Write it without clusters, too: texts, times and bytes of both."
        ),
    ] = False,
    seed: Annotated[int, options.seed("Seed of the sampling.")] = 0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the text alone: no progress, no table.")
    ] = False,
) -> None:
    """Stream text written by MODEL with clustered heads; then a table of time and memory."""
    if prompt is None or prompt == "-":
        prompt = _piped_in(asked=prompt == "-")
    shown = Output(as_json)
    with progress_bar(f"loading {model}", quiet=quiet):
        import torch

        from chai_attention.integrations.transformers import enable
        from chai_attention.integrations.transformers.devices import input_device
        from chai_attention.integrations.transformers.loading import load_model
        from chai_attention.integrations.transformers.placement import parse_placement
        from chai_attention.integrations.transformers.timed_generation import encode_prompt, write
        from chai_attention.runtime.shape import describe
        from chai_attention.runtime.skeleton import require_fit

        placement = parse_placement(device_map, max_memory)
        chosen = ClusterProfile.resolve(_profile_of(model) if profile is None else profile)
        require_fit(model, chosen, trust_remote_code=trust_remote_code)
        loaded, tokenizer = load_model(
            model, dtype, device, trust_remote_code=trust_remote_code, placement=placement
        )
        chosen.check(describe(loaded))
        ids = encode_prompt(tokenizer, prompt, chat=chat).to(input_device(loaded))

    def written(name: str) -> Written:
        if compare:
            write(loaded, tokenizer, ids, max_new_tokens=2)  # the first call pays for set-up
            shown.say(f"--- {name}")
        torch.manual_seed(seed)
        run = write(
            loaded,
            tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            on_text=lambda text: shown.say(text, nl=False),
        )
        shown.say("" if quiet else "\n")
        return run

    runs = {_PLAIN: written(_PLAIN)} if compare else {}
    enable(loaded, chosen)
    runs[_CLUSTERED] = written(_CLUSTERED)
    shown.give(lambda: {"runs": {name: written_record(run) for name, run in runs.items()}})
    if quiet:
        return
    shown.say(generation_table(runs))
    if compare:
        shown.say(compared_line(runs[_PLAIN], runs[_CLUSTERED]))


def _piped_in(*, asked: bool) -> str:
    """The prompt from standard input, without the end of its last line.

    Raises:
        LoadError: nothing is piped in, or it is no text.
    """
    if sys.stdin is None or (sys.stdin.isatty() and not asked):
        raise LoadError("no prompt: give --prompt, or pipe one in")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise LoadError(f"the prompt from standard input is not UTF-8: {error}") from error


def _profile_of(model: str) -> str:
    """The folder of a model that has a profile in it.

    Raises:
        ProfileError: it has none.
    """
    if not holds_export(model):
        raise ProfileError(
            f"{model} has no {EXPORTED}: give --profile (chai calibrate writes one), or a folder "
            "that chai export wrote"
        )
    return model
