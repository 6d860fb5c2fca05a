"""``chai export``: write a checkpoint that includes a profile and its refit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chai_attention.cli import options
from chai_attention.cli.output import Output
from chai_attention.cli.progress import import_libraries, progress_bar
from chai_attention.profile import ClusterProfile


def export_command(
    model: options.Model,
    profile: Annotated[str, typer.Option(help="The profile, with or without a refit.")],
    out: Annotated[Path, typer.Option(help="Folder to write; empty or new.")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: as MODEL was saved.")
    ] = "auto",
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Write MODEL with refit weights and its profile, for from_pretrained and vLLM."""
    import_libraries(quiet=quiet)
    from chai_attention.integrations.transformers.export import export, require_empty
    from chai_attention.integrations.transformers.loading import load_model, saved_dtype
    from chai_attention.integrations.transformers.placement import parse_placement
    from chai_attention.integrations.transformers.room import Work
    from chai_attention.runtime.skeleton import require_fit

    placement = parse_placement(device_map, max_memory)
    chosen = ClusterProfile.resolve(profile)
    require_empty(out)  # before the model is loaded, which can take minutes
    require_fit(model, chosen, trust_remote_code=trust_remote_code)
    if dtype == "auto":
        dtype = saved_dtype(model, trust_remote_code=trust_remote_code)
    with progress_bar(f"loading {model}", quiet=quiet) as bar:
        loaded, tokenizer = load_model(
            model, dtype, "cpu" if placement is None else "auto", placement=placement,
            trust_remote_code=trust_remote_code, work=lambda config: Work(0),
        )  # fmt: skip
        bar.describe(f"writing {out}")
        path = export(loaded, tokenizer, chosen, out)
    Output(quiet=quiet).say(f"model written to {out}, its profile to {path}")
