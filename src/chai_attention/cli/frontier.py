"""``chai frontier``: perplexity rise against K,V bytes saved, for several calibrations."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from chai_attention.atomic_write import write_whole
from chai_attention.cli import options
from chai_attention.cli.output import Output, note
from chai_attention.cli.progress import import_libraries, progress_bar
from chai_attention.cli.tables import render
from chai_attention.errors import CalibrationError
from chai_attention.evaluation.points import FrontierError, PointFile

_FILES = ("frontier.json", "frontier.txt", "frontier.png")
Number = TypeVar("Number", int, float)


def frontier_command(
    command: typer.Context,
    model: options.Model,
    text: Annotated[
        list[str],
        typer.Option(
            help="Calibration text: a file, a data set of the hub, or self; again for a mixture, "
            "with weights if you like: --text a.txt:0.7 --text b.jsonl:0.3."
        ),
    ],
    test: Annotated[
        list[str],
        typer.Option(help="Text to measure on, which calibration does not see; again for several."),
    ],
    out: Annotated[
        Path,
        options.output(
            "Folder for frontier.json, frontier.txt and frontier.png. Points that its "
            "frontier.json holds are not measured again.",
            *_FILES,
        ),
    ],
    budgets: Annotated[str, typer.Option(help="What to save, percent.")] = "5,10,20",
    of: Annotated[
        str, typer.Option(help="What budgets are percent of: bytes (of K and V) or heads.")
    ] = "bytes",
    recipes: Annotated[
        str,
        typer.Option(
            help="all, or some of default, stream, share, paper, online, scores, value, gradient, "
            "blend, gradient+recent, gradient+recent+refit, blend+recent, and files of ready "
            "profiles (.json)."
        ),
    ] = "all",
    contexts: Annotated[str, typer.Option(help="Tokens per test sequence.")] = "256,1024",
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the context that recipes with streaming heads are to save bytes of.",
            show_default="the longest of --contexts",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="scores or k-bytes, as in chai calibrate; paper of heads is always scores."
        ),
    ] = None,
    tensor_parallel: Annotated[
        str,
        typer.Option(
            help="GPUs that profiles are to be served on, as in chai calibrate; of several, such "
            "as 1,2,4, every recipe is measured for each."
        ),
    ] = "1",
    samples: Annotated[
        int,
        typer.Option(help="Sequences of calibration text; a quarter more checks refits.", min=4),
    ] = 128,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per calibration sequence.", show_default="256, or the model's maximum"
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(help="Sequences of every test text, of the longest context.", min=1)
    ] = 16,
    seed: Annotated[int, options.seed("Which sequences of the texts are used.")] = 0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure perplexity against K,V bytes saved for several calibrations of MODEL."""
    import_libraries(quiet=quiet)
    from chai_attention.calibration import calibrate, load_texts, windows_of
    from chai_attention.calibration.data import hold_out
    from chai_attention.calibration.evidence import EvidenceStore
    from chai_attention.calibration.recall_source import split_recall
    from chai_attention.calibration.sizes import BATCH_SIZE, LENGTH, sequence_length
    from chai_attention.calibration.sources import (
        mixed_sequences,
        parse_sources,
        require_unseen,
    )
    from chai_attention.calibration.texts import beginning, check_source
    from chai_attention.calibration.work import reading_work, require_readable
    from chai_attention.evaluation import frontier
    from chai_attention.integrations.transformers.loading import load_model
    from chai_attention.integrations.transformers.placement import parse_placement
    from chai_attention.reports.frontier import frontier_plot, frontier_table
    from chai_attention.runtime.shape import describe

    placement = parse_placement(device_map, max_memory)
    asked = {"bytes": "save", "heads": "removed"}.get(of)
    if asked is None:
        raise FrontierError(f"--of is bytes or heads, not {of!r}")
    named, recall = split_recall(text)
    sources = parse_sources(named)
    shares = [percent / 100 for percent in _numbers("--budgets", budgets, float)]
    lengths = _numbers("--contexts", contexts, int)
    ranks = list(dict.fromkeys(_numbers("--tensor-parallel", tensor_parallel, int)))
    recipe_names = [name.strip() for name in recipes.split(",")]
    chosen = frontier.recipes_named(recipe_names)
    given = {"--context": context, "--text recall": recall}
    frontier.require_streaming(chosen, [name for name, value in given.items() if value is not None])
    names = {Path(name).name: name for name in test}
    if len(names) < len(test):
        raise FrontierError("two test texts have the same name: give each once, or rename one")
    for path in names.values():
        require_unseen(path, sources, FrontierError)
    texts = {*names.values(), *(source.name for source in sources)}
    options.keep_inputs([out / name for name in _FILES], [model, device_map, *texts, *recipe_names])
    # a missing file should not wait for the model to load
    for name in texts:
        check_source(name)
    options.make_folder(command, out, FrontierError)
    require_readable(model, [length, *lengths], trust_remote_code=trust_remote_code)
    studied = length or LENGTH
    with progress_bar(f"loading {model}", quiet=quiet):
        loaded, tokenizer = load_model(
            model, dtype, device, trust_remote_code=trust_remote_code, placement=placement,
            work=reading_work([*lengths, studied], BATCH_SIZE, studied, gradients=True),
        )  # fmt: skip
    if asked == "save":
        chosen = frontier.for_bytes(chosen, describe(loaded))
    chosen = frontier.for_context(chosen, context or max(lengths), recall)
    chosen = frontier.for_ranks(chosen, ranks)
    length = sequence_length(loaded, length=length)
    longest = sequence_length(loaded, length=max(lengths))
    tests = {}
    for name, path in names.items():
        documents = load_texts(
            path, tokens=windows * longest, tokenizer=tokenizer, length=longest, seed=seed
        )
        tests[name] = windows_of(documents, tokenizer, windows, longest, seed)
    extra = max(2, samples // 4)
    mixture, labels = mixed_sequences(sources, loaded, tokenizer, samples + extra, length, seed)
    count = max(1, len(mixture) * extra // (samples + extra))
    held_out = hold_out(len(mixture), count, labels)
    calibration, held = mixture[~held_out], mixture[held_out]
    about = {
        "model": Path(model).name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "calibration text": [f"{Path(s.name).name}:{s.weight:g}" for s in sources],
        "calibration windows": list(calibration.shape),
        "calibration tokens": frontier.digest_of(calibration),
        "seed": seed,
        "target": target,
    }
    kept = PointFile(out / "frontier.json", about)
    refused: list[str] = []

    def refuse(name: str, budget: float, error: CalibrationError) -> None:
        refused.append(f"left out: {name} at {budget:.1%}: {error}")

    with progress_bar("starting", quiet=quiet) as bar:
        points = frontier.frontier(
            loaded,
            chosen,
            shares,
            frontier.FrontierTexts(tests, lengths, beginning(tokenizer)),
            calibrate_one=partial(
                calibrate,
                loaded,
                tokenizer,
                calibration,
                samples=len(calibration),
                length=length,
                target=target,
                seed=seed,
                held_out=held,
                measure=False,  # the test texts do
                store=EvidenceStore(loaded, calibration),  # one pass for all budgets
            ),
            asked=asked,
            kept=kept,
            on_refusal=refuse,
            progress=bar.tell,
        )
    for line in refused:
        note(line)
    if not points:
        raise FrontierError("no recipe could be calibrated to any of these budgets")
    table = render(frontier_table(points))
    shown = Output(as_json, quiet)
    shown.give(lambda: json.loads((out / "frontier.json").read_bytes()))
    shown.say(table)
    write_whole(out / "frontier.txt", f"{table}\n".encode(), FrontierError)
    shown.say(f"points and table written to {out / 'frontier.json'}, {out / 'frontier.txt'}")
    shown.say(f"plot written to {frontier_plot({'': points}, out / 'frontier.png')}")


def _numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """Numbers above 0 separated by commas."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        kinds = "whole numbers" if kind is int else "numbers"
        raise FrontierError(f"{option} is {kinds} above 0 separated by commas, not {text!r}")
    return numbers
