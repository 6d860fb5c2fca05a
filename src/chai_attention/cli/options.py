"""Options that several commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from chai_attention.atomic_write import require_file, require_folder, require_other
from chai_attention.errors import CalibrationError, ChaiError, FileError
from chai_attention.profile_files import EXPORTED

LARGEST_SEED = 2**64 - 1  # that torch takes


def known(context: typer.Context, name: str | None) -> str | None:
    """Refuse a model that is nowhere, before torch is imported and text is read."""
    if name is not None and not context.resilient_parsing:  # which is: the shell completes
        from chai_attention.hub import find_model

        find_model(name)
    return name


def offer(*values: str) -> Callable[[str], list[str]]:
    """Let the shell complete these values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


_MODEL_HELP = "Folder of a model, its name on the hub, a .gguf file, or smollm2-135m."

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help=_MODEL_HELP, callback=known, autocompletion=offer("smollm2-135m")
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", help=_MODEL_HELP, callback=known, autocompletion=offer())
]
complete_profile = offer("llama-7b", "llama-33b")
Profile = Annotated[
    str | None,
    typer.Option(
        help="A profile, or the name of a published schedule.",
        show_default="chai_profile.json of the folder MODEL",
        autocompletion=complete_profile,
    ),
]
DType = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: bfloat16 on a GPU, else float32.",
        autocompletion=offer("auto", "float32", "bfloat16", "float16"),
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, or auto: a GPU if there is one.",
        autocompletion=offer("auto", "cpu", "cuda"),
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="auto|balanced|FILE",
        help="Divide the model among all GPUs (accelerate): auto or balanced, as evenly as "
        "possible, or a JSON file of modules and devices.",
        autocompletion=offer("auto", "balanced"),
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="0=SIZE,cpu=SIZE",
        help="With --device-map: what weights may take of each GPU, and of the host where cpu is "
        "named: 0=70GiB,1=70GiB,cpu=100GiB.",
        show_default="what GPUs have free, less room for the work",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that MODEL comes with, if it needs to."
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Show no progress and no tables: warnings and errors alone."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the results as one JSON object, and no tables.")
]


def seed(text: str) -> Any:
    """An option ``--seed`` with this help, in torch's range."""
    return typer.Option(help=text, min=0, max=LARGEST_SEED)


def given(context: typer.Context, *names: str) -> list[str]:
    """Those of the named parameters that stand on the command line, as options."""
    sources = ((name, context.get_parameter_source(name)) for name in names)
    return [
        f"--{name.replace('_', '-')}"
        for name, source in sources
        if source is not None and source.name == "COMMANDLINE"
    ]


def finite(value: float | None) -> float | None:
    """Callback of an option with a number: NaN is within every range, and infinity in most."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def share(option: str, text: str | None, *, bare: float = 1.0) -> float | None:
    """``1%`` or ``0.01`` as a share; None stays None.

    Args:
        option: its name.
        text: as it was written.
        bare: a number without a percent sign is less than 1, and at most this.

    Raises:
        CalibrationError: not a number, or one that is likely to be percent.
    """
    if text is None:
        return None
    percent = text.rstrip().endswith("%")
    try:
        number = float(text.rstrip().removesuffix("%"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise CalibrationError(f"{option} is a share such as 1% or 0.01, not {text!r}")
    if percent:
        return number / 100
    if number >= 1 or number > bare:
        raise CalibrationError(
            f"{option} {text} would be {number:.0%}: write {number:g}% or {number:.0%}, with the "
            "percent sign"
        )
    return number


def help_without_command(context: typer.Context) -> None:
    """Show the help of a group of commands if none of them is named."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


def output(text: str, *names: str) -> Any:
    """An option for a path to write, which is refused before any work if it cannot be written.

    Args:
        text: its help.
        names: files that are written into it, if it is a folder; none if it is a file.
    """

    def check(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing:
            if names:
                require_folder(path, FileError, names)
            else:
                require_file(path, FileError)
        return path

    return typer.Option(help=text, callback=check)


def keep_inputs(outputs: Sequence[Path], inputs: Sequence[str | Path | None]) -> None:
    """Refuse to write over what a command reads; a folder stands for the files in it.

    Raises:
        FileError: names the file.
    """
    read: list[str | Path] = []
    for given in inputs:
        if given is None:
            continue
        read.append(given)
        if os.path.isdir(given):
            # a profile beside its model is what calibrate is asked for
            read += [path for path in Path(given).iterdir() if path.name != EXPORTED]
    require_other(outputs, read, FileError)


def make_folder(command: typer.Context, folder: Path, error: type[ChaiError]) -> None:
    """Make a folder for results now; a command that ends without any takes it away again.

    Args:
        command: whose results these are.
        folder: with those above it.
        error: raised if it cannot be made.

    Raises:
        ChaiError: ``error``.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise error(f"cannot write to {folder}: {problem.strerror}") from problem

    def tidy() -> None:
        with suppress(OSError):  # somebody else may have put something there
            for path in made:
                path.rmdir()

    command.call_on_close(tidy)
