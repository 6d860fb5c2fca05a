"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a model, its name on the hub, a .gguf file, or smollm2-135m.",
    ),
]
DType = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: bfloat16 on a GPU, else float32.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]


def share(option: str, text: str | None) -> float | None:
    """``1%`` or ``0.01`` as a share; None stays None.

    Raises:
        CalibrationError: not a number.
    """
    from chai_attention.errors import CalibrationError

    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise CalibrationError(f"{option} is a share such as 1% or 0.01, not {text!r}") from None
