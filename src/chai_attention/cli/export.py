"""``chai export``: a checkpoint with a profile and its refit in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chai_attention.cli import options


def export_command(
    model: options.Model,
    profile: Annotated[str, typer.Option(help="The profile, with or without a refit.")],
    out: Annotated[Path, typer.Option(help="Folder to write; empty or new.")],
    dtype: options.DType = "auto",
) -> None:
    """Write MODEL with refit weights and its profile, for from_pretrained and vLLM."""
    from chai_attention.cli.loading import load_model
    from chai_attention.integrations.transformers.export import export
    from chai_attention.profile import ClusterProfile

    chosen = ClusterProfile.resolve(profile)
    loaded, tokenizer = load_model(model, dtype, "cpu")
    path = export(loaded, tokenizer, chosen, out)
    typer.echo(f"model written to {out}, its profile to {path}")
