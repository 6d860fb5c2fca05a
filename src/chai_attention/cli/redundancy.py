"""``chai redundancy``: how similar heads are, and whether clusters change within a request."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from chai_attention.cli import options
from chai_attention.cli.output import Output
from chai_attention.cli.progress import import_libraries, progress_bar
from chai_attention.cli.tables import render

_FILES = ("redundancy.json", "correlation.png", "elbow.png", "sizes.png", "stability.png")
_maps = partial(typer.Option, rich_help_panel="Maps to look at (chai report)")


def redundancy_command(
    model: options.Model,
    text: Annotated[
        list[str],
        typer.Option(
            help="Text that requests are cut from: a file, a data set of the hub, or self; again "
            "for a mixture, with weights if you like, as in chai calibrate."
        ),
    ],
    out: Annotated[
        Path,
        options.output("Folder for redundancy.json and its plots.", *_FILES),
    ],
    samples: Annotated[int, typer.Option(help="Requests.", min=2)] = 32,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens per request.", show_default="256, or the model's maximum"),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Numbers of first tokens to compute memberships from: 5,32,128. Memberships of "
            "the others are compared with those of the first.",
            show_default="5, 16 and its doubles",
        ),
    ] = None,
    clusters: Annotated[
        int | None,
        typer.Option(help="Clusters of every layer.", show_default="each layer's elbow", min=1),
    ] = None,
    show: Annotated[int, _maps(help="Requests whose maps are kept.", min=0)] = 2,
    prompt: Annotated[
        list[str] | None, _maps(help="Keep the maps of this text, too; again for more.")
    ] = None,
    cells: Annotated[
        int, _maps(help="Cells per side of a map; tokens of longer texts are pooled.", min=2)
    ] = 48,
    seed: Annotated[int, options.seed("Which sequences of the text are used.")] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Requests that run at once.", min=1, max=2**20)
    ] = 4,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Study the redundancy of MODEL's heads: correlation, elbow curves, clusters over time."""
    import_libraries(quiet=quiet)
    from chai_attention.calibration.sizes import LENGTH, sequence_length
    from chai_attention.calibration.sources import mixed_sequences, parse_sources
    from chai_attention.calibration.work import reading_work, require_readable
    from chai_attention.evaluation.redundancy import parse_lengths, shown_prompts, study
    from chai_attention.integrations.transformers.loading import load_model
    from chai_attention.integrations.transformers.placement import parse_placement
    from chai_attention.reports.drawing import require_matplotlib
    from chai_attention.reports.redundancy import redundancy_plots, redundancy_table

    require_matplotlib()
    placement = parse_placement(device_map, max_memory)
    sources = parse_sources(text)
    options.keep_inputs(
        [out / _FILES[0]], [model, device_map, *(source.name for source in sources)]
    )
    asked = None if lengths is None else parse_lengths(lengths)
    require_readable(model, [length], trust_remote_code=trust_remote_code)
    studied = length or LENGTH
    with progress_bar(f"loading {model}", quiet=quiet) as bar:
        loaded, tokenizer = load_model(
            model, dtype, device, trust_remote_code=trust_remote_code, placement=placement,
            work=reading_work([studied], batch_size, studied),
        )  # fmt: skip
        bar.describe("reading text")
        length = sequence_length(loaded, length=length)
        windows, _ = mixed_sequences(sources, loaded, tokenizer, samples, length, seed)

        found = study(
            loaded,
            windows,
            name=Path(model).name,
            text={"sources": [f"{Path(s.name).name}:{s.weight:g}" for s in sources], "seed": seed},
            prompts=shown_prompts(tokenizer, windows, show, prompt or [], most=length),
            lengths=asked,
            clusters=clusters,
            cells=cells,
            batch_size=batch_size,
            progress=bar.tell,
        )
    shown = Output(as_json, quiet)
    shown.say(render(redundancy_table(found), width=110))
    file = found.save(out / "redundancy.json")
    shown.give(lambda: json.loads(file.read_bytes()))
    shown.say(f"study written to {file}")
    for path in redundancy_plots(found, out):
        shown.say(f"plot written to {path}")
