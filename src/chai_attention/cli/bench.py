"""``chai bench``: speed and memory, compared with baselines and the ideal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from chai_attention.cli import options
from chai_attention.cli.output import Output
from chai_attention.cli.progress import import_libraries, progress_bar
from chai_attention.cli.tables import render
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress
from chai_attention.reports import bench as reports
from chai_attention.reports.drawing import require_matplotlib
from chai_attention.results import write_result

bench_app = typer.Typer(
    help="Measure attention or a whole model beside baselines and the ideal; results are checked "
    "first.",
    invoke_without_command=True,
    callback=options.help_without_command,
)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="llama-7b, llama-33b or opt-66b, a folder of a model, or its name on the hub.",
        show_default="llama-7b, or what the profile says",
    ),
]
Profile = Annotated[
    str | None, typer.Option(help="A profile, or the name of a published schedule.")
]
Seconds = Annotated[
    float | None,
    typer.Option(
        help="How long to repeat each timing.",
        show_default="0.1 on a GPU, else 1",
        min=0,
        max=86400,
        callback=options.finite,
    ),
]
Seed = Annotated[int, options.seed("Seed of inputs and memberships.")]
Out = Annotated[Path | None, options.output("Write all figures here (JSON).")]
Plot = Annotated[Path | None, options.output("Draw them here (PNG).")]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="REV",
        help="Run it with the code of this git revision first, and compare; needs a checkout.",
    ),
]


@bench_app.command("attention")
def attention_command(
    model: Model = None,
    profile: Profile = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="decode:BATCHxTOKENS or prefill:BATCHxTOKENS, such as decode:16x8192; again for "
            "several.",
            show_default="those of docs/results",
        ),
    ] = None,
    clusters: Annotated[
        str | None,
        typer.Option(
            help="Numbers of clusters: 4,16,all.",
            show_default="those of the profile, else an eighth, half and all of the heads",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16, or several: float32,bfloat16.",
            show_default="bfloat16 on a GPU, else float32,bfloat16",
        ),
    ] = None,
    paged: Annotated[
        int | None,
        typer.Option(help="Keep K and V in pages of so many tokens (on a GPU).", min=1),
    ] = None,
    cache_dtype: Annotated[
        str,
        typer.Option(help="Pages' dtype: auto (as --dtype), or fp8, 8-bit floats as in a server."),
    ] = "auto",
    recent: Annotated[
        str | None,
        typer.Option(
            help="RECENT+SINKS keys that every head sees with its own scores: 32+4; 0 for none.",
            show_default="those of the profile, else none",
        ),
    ] = None,
    streaming: Annotated[
        int,
        typer.Option(
            help="Streaming heads, which attend to the keys of --recent only, beside the clusters; "
            "with grouped queries all of a K/V head.",
            min=0,
        ),
    ] = 0,
    device: options.Device = "auto",
    seconds: Seconds = None,
    seed: Seed = 0,
    out: Out = None,
    plot: Plot = None,
    base: Base = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time one layer's clustered attention against every attention that is installed."""
    import_libraries(quiet=quiet)
    from chai_attention.benchmarking import cases, presets
    from chai_attention.benchmarking.attention import AttentionRequest, bench_attention
    from chai_attention.benchmarking.clustered import Layout
    from chai_attention.runtime.skeleton import load_config

    _check_outputs(out, plot, [model, profile])
    device = cases.resolve_device(device)
    chosen = None if profile is None else ClusterProfile.resolve(profile)
    read_config = partial(load_config, trust_remote_code=trust_remote_code)
    shape = presets.resolve_attention(model, profile, chosen, read_config)
    window = (0, 0) if chosen is None else (chosen.recent, chosen.sinks)
    window = window if recent is None else cases.parse_recent(recent)
    if clusters is not None:
        counts = cases.parse_clusters(clusters, shape.heads)
    elif chosen is not None:
        counts = presets.profile_clusters(chosen)
    else:
        counts = cases.default_clusters(shape.heads)
    request = AttentionRequest(
        shape=shape,
        cases=[cases.parse_case(text) for text in case or ()] or cases.default_cases(device),
        clusters=counts,
        dtypes=cases.default_dtypes(device) if dtype is None else cases.parse_dtypes(dtype),
        device=device,
        layout=Layout(paged, *window, narrow=cases.parse_cache_dtype(cache_dtype)),
        seconds=cases.default_seconds(device) if seconds is None else seconds,
        seed=seed,
        representatives={} if chosen is None else presets.profile_representatives(chosen),
        streaming=streaming,
    )
    _report(
        lambda progress: bench_attention(request, progress),
        reports.attention_tables, reports.attention_plot, out, plot, Output(as_json, quiet), base,
    )  # fmt: skip


@bench_app.command("model")
def model_command(
    model: Model = None,
    profile: Profile = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="BATCHxPROMPT, such as 1x2048; again for several.", show_default="1x2048"
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens behind the prompt that are timed.", min=1)
    ] = 16,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Build so many layers only, with random weights, and take the profile's evenly.",
            min=1,
        ),
    ] = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    seconds: Seconds = None,
    seed: Seed = 0,
    out: Out = None,
    plot: Plot = None,
    base: Base = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time first and further tokens of a whole model: unfused, fused and clustered attention.

    A preset has random weights; a folder or a name of the hub has its own, unless --layers is
    given. Without --profile, llama-7b and llama-33b take their published schedule.
    """
    import_libraries(quiet=quiet)
    from chai_attention.benchmarking import cases, presets
    from chai_attention.benchmarking import model as models
    from chai_attention.integrations.transformers.loading import load_model, resolve_dtype
    from chai_attention.integrations.transformers.placement import parse_placement
    from chai_attention.integrations.transformers.room import Work
    from chai_attention.runtime.skeleton import load_config

    _check_outputs(out, plot, [model, profile])
    placement = parse_placement(device_map, max_memory)
    if placement is not None and device != "auto":
        raise cases.BenchmarkError("--device-map says where the model goes: leave out --device")
    device = cases.resolve_device(device)
    sizes = [cases.parse_size(text) for text in case or ["1x2048"]]
    longest = max(tokens for _, tokens in sizes) + new_tokens + 1
    read_config = partial(load_config, trust_remote_code=trust_remote_code)
    plan = presets.resolve_model(model, profile, layers, longest, read_config)
    kind = resolve_dtype(dtype, device)
    config = read_config(str(model)) if plan.config is None else plan.config
    room = models.require_memory(
        config, sizes, new_tokens, kind, device, random=plan.config is not None,
        divided=placement is not None,
    )  # fmt: skip
    if plan.config is None:
        with progress_bar(f"loading {model}", quiet=quiet):
            loaded, _ = load_model(
                str(model), dtype, "auto" if placement is not None else device,
                trust_remote_code=trust_remote_code, placement=placement,
                work=lambda config: Work(0, beside=room),
            )  # fmt: skip
    else:
        loaded = models.random_model(config, kind, device, seed, placement, room)
    request = models.ModelRequest(
        name=plan.name,
        profile=plan.profile,
        profile_name=plan.profile_name,
        sizes=sizes,
        new_tokens=new_tokens,
        seconds=cases.default_seconds(device) if seconds is None else seconds,
        seed=seed,
    )
    _report(
        lambda progress: models.bench_model(loaded, request, progress),
        reports.model_tables, reports.model_plot, out, plot, Output(as_json, quiet), base,
    )  # fmt: skip


def _check_outputs(out: Path | None, plot: Path | None, inputs: Sequence[str | None]) -> None:
    """Refuse, before anything is measured, what would be written over or not be drawn."""
    if plot is not None:
        require_matplotlib()
    options.keep_inputs([path for path in (out, plot) if path is not None], inputs)


def _report(
    measure: Callable[[Progress], dict[str, Any]],
    tables: Callable[[dict[str, Any]], Sequence[Any]],
    draw: Callable[[dict[str, Any], Path], Path],
    out: Path | None,
    plot: Path | None,
    shown: Output,
    base: str | None,
) -> None:
    """Measure with a progress bar, then show and write what came out."""
    from chai_attention.benchmarking.cases import BenchmarkError
    from chai_attention.benchmarking.revisions import compared, resolve_revision, run_revision

    with progress_bar("starting", quiet=shown.quiet) as bar:
        other = None
        if base is not None:
            root, commit = resolve_revision(base)
            bar.describe(f"revision {commit[:12]}")
            other = {"revision": commit, **run_revision(root, commit, sys.argv[1:])}
        report = measure(bar.tell)
        if other is not None:
            report["base"] = {**other, "compared": compared(report, other)}
    shown.give(lambda: report)
    for table in [*tables(report), *reports.base_tables(report)]:
        shown.say(render(table, width=140))
    if out is not None:
        shown.say(f"figures written to {write_result(out, report, BenchmarkError)}")
    if plot is not None:
        shown.say(f"plot written to {draw(report, plot)}")
