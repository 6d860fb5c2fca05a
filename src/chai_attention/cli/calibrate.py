"""``chai calibrate``: from a model and text to a profile."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from chai_attention.atomic_write import require_file
from chai_attention.cli import options, tables
from chai_attention.cli.output import Output, note
from chai_attention.cli.progress import import_libraries, progress_bar
from chai_attention.cli.records import profile_record
from chai_attention.errors import CalibrationError, FileError

EVIDENCE = ".evidence"  # beside the profile: what an interrupted calibration has found
_budget = partial(typer.Option, rich_help_panel="Budget (one of these)")
_recipe = partial(typer.Option, rich_help_panel="Recipe")
_data = partial(typer.Option, rich_help_panel="Text")


def calibrate_command(
    model: options.Model,
    out: Annotated[Path, options.output("Write the profile here (JSON).")],
    text: Annotated[
        list[str] | None,
        _data(
            help="Sample text: a text file, records or chats (.jsonl, .json, .csv, .parquet), a "
            "data set of the hub (name or name:config), or self: the model writes it. Again for a "
            "mixture, with weights if you like: --text a.txt:0.7 --text b.jsonl:0.3. recall:weight "
            "hides facts to recall in sequences of the other text; its weight is relative to all "
            "of that (with streaming heads 0.25; recall:0 for none).",
            show_default="self",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        _data(
            help="Sequences of text to use.",
            show_default="64 with streaming heads, 256 with cost gradient, else 1024",
        ),
    ] = None,
    held_out: Annotated[int, _data(help="Further sequences, to measure the loss on.", min=2)] = 64,
    length: Annotated[
        int | None,
        _data(
            help="Tokens per sequence.",
            show_default="1024 with streaming heads, else 256, or the model's maximum",
        ),
    ] = None,
    seed: Annotated[
        int, _data(help="Which sequences of the text are used.", min=0, max=options.LARGEST_SEED)
    ] = 0,
    max_loss: Annotated[
        str | None,
        _budget(
            help="Largest rise of perplexity on held-out text, such as 1%.",
            show_default="1% with recipes default, share and stream",
        ),
    ] = None,
    max_recall_loss: Annotated[
        str | None,
        _budget(
            help="With --max-loss: largest fall of the share of facts recalled, in points.",
            show_default="5% with streaming heads, if the model recalls any",
        ),
    ] = None,
    save: Annotated[
        str | None,
        _budget(
            help="K,V bytes to save, such as 20%: per token, or with streaming heads at --context."
        ),
    ] = None,
    removed: Annotated[
        str | None,
        _budget(help="Heads (or K/V heads, with target k-bytes) to remove, such as 25%."),
    ] = None,
    clusters: Annotated[
        str | None, _budget(help="elbow, one number for all layers, or a list: 32,32,4.")
    ] = None,
    max_error: Annotated[
        float | None,
        _budget(
            help="With the elbow: bound on the relative clustering error, 0 to 1.",
            show_default="0.1 for scores, 0.3 for k-bytes; paper: 1",
            callback=options.finite,
        ),
    ] = None,
    recipe: Annotated[
        str,
        _recipe(
            help="default: every head keeps its far keys, shares another's or forgets them, by "
            "gradient costs, with an exact recent window; share, stream: only one of the last two; "
            "elbow: k-means on attention maps; paper: as in CHAI.",
        ),
    ] = "default",
    cost: Annotated[
        str | None, _recipe(help="What merging heads is judged by: scores, value or gradient.")
    ] = None,
    membership: Annotated[
        str | None,
        _recipe(
            help="static: one map for all requests; online: cluster each request; blend: both."
        ),
    ] = None,
    target: Annotated[
        str | None,
        _recipe(
            help="scores or k-bytes (grouped-query models: choose the K/V heads that keep K).",
            show_default="k-bytes for grouped-query models",
        ),
    ] = None,
    recent: Annotated[
        str | None,
        _recipe(
            help="Last tokens that every head attends to with its own scores; 0 for none; auto for "
            "what serves the budget best at --context.",
            show_default="auto with recipes default and stream, 32 with share, else 0",
        ),
    ] = None,
    context: Annotated[
        int | None,
        _recipe(
            help="Tokens of the contexts that will be served; with streaming heads.",
            show_default="2048",
        ),
    ] = None,
    sinks: Annotated[
        int | None,
        _recipe(
            help="First tokens of the exact window, beside --recent.",
            show_default="4 with a recent window",
        ),
    ] = None,
    refit: Annotated[
        str | None,
        _recipe(help="Refit the output weights to what is left: none, output or bias."),
    ] = None,
    window: Annotated[
        int | None,
        _recipe(help="Tokens that decide an online membership.", show_default="32; paper: 5"),
    ] = None,
    probe_from: Annotated[
        str,
        _recipe(help="Where --window begins: start, or content (after the chat template)."),
    ] = "start",
    blend: Annotated[
        float | None,
        _recipe(
            help="Weight of the static cost in a blended membership.",
            show_default="1",
            callback=options.finite,
        ),
    ] = None,
    features: Annotated[
        str | None,
        _recipe(help="What a blended membership compares in --window: scores or value."),
    ] = None,
    tensor_parallel: Annotated[
        int,
        _recipe(
            help="GPUs that the profile will be served on: heads share within a GPU, and all of "
            "them save the same.",
            min=1,
        ),
    ] = 1,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say how long it would take and how much memory, and write nothing."
        ),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find which heads of MODEL can share their scores or forget far keys, at a loss you choose."""
    import_libraries(quiet=quiet)
    from chai_attention.calibration.estimate import estimate
    from chai_attention.calibration.evidence_file import check_place
    from chai_attention.calibration.recall_source import split_recall
    from chai_attention.calibration.request import TextRequest, calibrate_on
    from chai_attention.calibration.settings import Settings
    from chai_attention.calibration.sources import parse_sources
    from chai_attention.calibration.work import require_readable, work_of
    from chai_attention.integrations.transformers.loading import load_model
    from chai_attention.integrations.transformers.placement import parse_placement
    from chai_attention.profile_files import corrections_file
    from chai_attention.runtime.shape import describe

    placement = parse_placement(device_map, max_memory)
    named, recall = split_recall(text or ["self"])
    settings = Settings(
        recipe=recipe,
        cost=cost,
        membership=membership,
        target=target,
        window=window,
        features=features,
        blend=blend,
        recent=None if recent is None else _recent(recent),
        sinks=sinks,
        refit=refit,
        clusters=None if clusters is None else _counts(clusters),
        max_error=max_error,
        max_loss=options.share("--max-loss", max_loss, bare=0.2),
        save=options.share("--save", save),
        removed=options.share("--removed", removed),
        context=context,
        recall=recall,
        max_recall_loss=options.share("--max-recall-loss", max_recall_loss),
        tensor_parallel=tensor_parallel,
        seed=seed,
    )
    sources = parse_sources(named)
    options.keep_inputs([out], [model, device_map, *(source.name for source in sources)])
    request = TextRequest(sources, samples, held_out, length, probe_from)
    evidence = out.with_name(f"{out.name}{EVIDENCE}")
    # a missing file, or one in the way, should not wait for the model to load
    request.check(seed)
    check_place(evidence)
    if settings.refit not in (None, "none"):
        require_file(corrections_file(out), FileError)
    require_readable(model, [length], trust_remote_code=trust_remote_code)
    with progress_bar(f"loading {model}", quiet=quiet) as bar:
        loaded, tokenizer = load_model(
            model, dtype, device, trust_remote_code=trust_remote_code, placement=placement,
            work=work_of(settings, length),
        )  # fmt: skip
        if dry_run:
            found = estimate(loaded, tokenizer, request, settings, bar.tell)
        else:
            profile, warning = calibrate_on(
                loaded, tokenizer, request, settings, bar.tell, evidence
            )
    shown = Output(as_json, quiet)
    if dry_run:
        shown.give(lambda: {**asdict(found), "at_most": found.at_most})
        shown.say(tables.estimate_lines(found))
        return
    profile.save(out)
    evidence.unlink(missing_ok=True)
    shape = describe(loaded)
    if warning is not None:
        note(f"warning: {warning}")
    shown.give(lambda: profile_record(profile, shape, loaded.dtype.itemsize))
    shown.say(tables.profile_table(profile, shape))
    shown.say(tables.summary_line(profile, shape, loaded.dtype.itemsize))
    for line in tables.measured_lines(profile):
        shown.say(line)
    shown.say(f"profile written to {out}")


def _recent(recent: str) -> int | str:
    """``auto`` or a number of tokens."""
    if recent == "auto":
        return recent
    try:
        return int(recent)
    except ValueError:
        raise CalibrationError(f"--recent is a number of tokens, or auto, not {recent!r}") from None


def _counts(clusters: str) -> str | int | list[int]:
    """``elbow``, a number, or numbers separated by commas."""
    if clusters == "elbow":
        return clusters
    try:
        numbers = [int(part) for part in clusters.split(",")]
    except ValueError:
        raise CalibrationError(
            f"--clusters is elbow, a number, or numbers separated by commas, not {clusters!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
