"""``chai calibrate``: from a model and text to a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chai_attention.cli import options


def calibrate_command(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Write the profile here (JSON).")],
    text: Annotated[
        str,
        typer.Option(
            help="Sample text: a text file, a .jsonl, a data set of the hub (name or name:config), "
            "or self: the model writes it."
        ),
    ] = "self",
    samples: Annotated[int, typer.Option(help="Windows of text to use; fewer are faster.")] = 1024,
    length: Annotated[
        int | None, typer.Option(help="Tokens per window. [default: 256, or the model's maximum]")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="First tokens that decide an online membership. [default: 32; paper: 5]"),
    ] = None,
    clusters: Annotated[
        str, typer.Option(help="elbow, one number for all layers, or a list: 32,32,4.")
    ] = "elbow",
    membership: Annotated[
        str, typer.Option(help="online: cluster each request; static: one map for all.")
    ] = "online",
    target: Annotated[
        str | None,
        typer.Option(
            help="scores or k-bytes (grouped-query models: choose the K/V heads that keep K). "
            "[default: k-bytes for grouped-query models]"
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="With the elbow: bound on the relative clustering error, 0 to 1. "
            "[default: 0.1 for scores, 0.3 for k-bytes; paper: 1]"
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="default, or paper: as in CHAI.")] = "default",
    seed: Annotated[int, typer.Option(help="Which windows of the text are used.")] = 0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
) -> None:
    """Find how many clusters of heads each layer of MODEL needs."""
    from chai_attention.calibration import calibrate, load_texts, self_text
    from chai_attention.calibration.calibrate import DEFAULT_LENGTH, window_length
    from chai_attention.cli.loading import load_model
    from chai_attention.cli.progress import progress_bar
    from chai_attention.cli.tables import profile_table, summary_line
    from chai_attention.errors import ProfileError
    from chai_attention.integrations.transformers.support import describe

    if not out.parent.is_dir():
        raise ProfileError(f"cannot write {out}: no folder {out.parent}")
    counts = _counts(clusters)
    # a missing file should not wait for the model to load
    texts = (
        None if text == "self" else load_texts(text, tokens=samples * (length or DEFAULT_LENGTH))
    )
    loaded, tokenizer = load_model(model, dtype, device)
    shape = describe(loaded)
    length = window_length(loaded, length)
    with progress_bar("calibrating") as progress:
        if texts is None:
            progress.describe("writing sample text")
            written = self_text(loaded, samples, length, seed=seed, progress=progress)
            progress.describe("calibrating")
        profile = calibrate(
            loaded,
            tokenizer,
            written if texts is None else texts,
            samples=samples,
            length=length,
            window=window,
            clusters=counts,
            membership=membership,
            target=target,
            max_error=max_error,
            recipe=recipe,
            seed=seed,
            source=Path(text).name if Path(text).is_file() else text,
            progress=progress,
        )
    profile.save(out)
    typer.echo(profile_table(profile, shape))
    typer.echo(summary_line(profile, shape, loaded.dtype.itemsize))
    typer.echo(f"profile written to {out}")


def _counts(clusters: str) -> str | int | list[int]:
    """``elbow``, a number, or numbers separated by commas."""
    from chai_attention.errors import CalibrationError

    if clusters == "elbow":
        return clusters
    try:
        numbers = [int(part) for part in clusters.split(",")]
    except ValueError:
        raise CalibrationError(
            f"--clusters is elbow, a number, or numbers separated by commas, not {clusters!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
