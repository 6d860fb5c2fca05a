"""``chai eval``: scores in lm-eval's tasks, with and without clusters and by other methods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from chai_attention.cli import options
from chai_attention.cli.output import Output, note
from chai_attention.cli.progress import import_libraries, progress_bar
from chai_attention.cli.tables import render
from chai_attention.errors import EvaluationError
from chai_attention.profile import ClusterProfile

_fit = partial(typer.Option, rich_help_panel="How comparators are fitted")
_FILES = ("results.json", "table.md")
VLLM = "vllm"
# options that say nothing to vLLM, and what to do instead
_NOT_SERVED = {
    ("jobs",): "vLLM runs one engine, on the GPUs of --tensor-parallel",
    ("device_map", "max_memory"): "--tensor-parallel divides the model among GPUs",
    ("device",): "vLLM runs where it was built to run",
    ("save", "calibration_text", "samples", "length"): "nothing is fitted: rows are the full "
    "model and the profile",
}


def eval_command(
    context: typer.Context,
    model: options.Model,
    tasks: Annotated[
        str,
        typer.Option(
            help="paper (piqa, hellaswag, arc_challenge, arc_easy, boolq), lambada, names of "
            "lm-eval's tasks, recall (facts hidden in text, asked for at its end), or last_word "
            "and perplexity (perplexity-2048: in sequences of so many tokens), which need --text; "
            "separated by commas."
        ),
    ] = "paper",
    profile: Annotated[
        str | None,
        typer.Option(help="The profile to evaluate, or the name of a published schedule."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Further rows: all, or names of comparators separated by commas."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with <task>.jsonl in the columns of the hub's data sets.",
            show_default="the hub",
            file_okay=False,
            exists=True,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Plain text for last_word, perplexity and recall, which no method was fitted to. "
            "Without it recall takes recall.jsonl of --data, or else English prose that every "
            "Python installation carries."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items of each task, from the front.", min=1)
    ] = None,
    recall_lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of recall's questions with their texts, such as 1k,2k,4k.",
            show_default="1k and its doubles up to the model's context, at most 32k",
        ),
    ] = None,
    recall_cases: Annotated[
        int, typer.Option(help="Questions of recall, for each length and number of facts.", min=1)
    ] = 100,
    out: Annotated[
        Path,
        options.output(
            "Folder for results, results.json and table.md. Results that it holds are kept: a "
            "run that was stopped goes on.",
            *_FILES,
        ),
    ] = Path("chai-eval"),
    save: Annotated[
        str | None,
        _fit(
            help="Share of the K,V bytes that methods with a budget save, such as 5%.",
            show_default="as the profile",
        ),
    ] = None,
    calibration_text: Annotated[
        list[str] | None,
        _fit(
            help="Text that methods learn from, as --text of chai calibrate.", show_default="self"
        ),
    ] = None,
    samples: Annotated[int, _fit(help="Sequences of that text.", min=4)] = 128,
    length: Annotated[
        int | None, _fit(help="Tokens per sequence.", show_default="256, or the model's maximum")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="What runs the model: transformers, or vllm, for models that are larger than a "
            "GPU; then rows are the full model and the profile, as they are served.",
            autocompletion=options.offer("transformers", "vllm"),
        ),
    ] = "transformers",
    tensor_parallel: Annotated[
        int, typer.Option(help="With --engine vllm: GPUs that share the model.", min=1)
    ] = 1,
    batch_size: Annotated[int, typer.Option(help="Inputs per forward.", min=1)] = 16,
    jobs: Annotated[
        int,
        typer.Option(
            help="Processes that score side by side, each with the model, over all GPUs.", min=1
        ),
    ] = 1,
    seed: Annotated[int, options.seed("Seed of every random choice.")] = 0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Evaluate MODEL by lm-eval's tasks: accuracy and likelihood, paired with the full model."""
    _check_engine(context, engine)
    import_libraries(quiet=quiet)
    from chai_attention.integrations.lm_eval import require

    require()
    from chai_attention.calibration.sizes import LENGTH
    from chai_attention.calibration.sources import parse_sources, require_unseen
    from chai_attention.calibration.work import reading_work, require_readable
    from chai_attention.evaluation.evaluate import Evaluation, evaluate
    from chai_attention.evaluation.lengths import require_lengths
    from chai_attention.evaluation.preparation import Calibration, comparator_names, prepare
    from chai_attention.evaluation.recall_tasks import parse_lengths, recall_sources, recall_text
    from chai_attention.evaluation.served import Served, longest_text, served_device, served_names
    from chai_attention.evaluation.side_by_side import Processes
    from chai_attention.evaluation.table import LEGEND, rich_tables
    from chai_attention.evaluation.tasks import RECALL, task_names, task_sources
    from chai_attention.integrations.transformers.loading import load_model, resolve_dtype
    from chai_attention.integrations.transformers.placement import parse_placement
    from chai_attention.runtime.shape import describe
    from chai_attention.runtime.skeleton import load_skeleton, require_fit

    names = task_names(tasks)
    _check_unused(context, compare, names)
    placement = parse_placement(device_map, max_memory)
    if placement is not None and jobs > 1:
        raise EvaluationError(
            "--jobs loads the model once for every process, --device-map divides one over all "
            "GPUs: leave one of them out"
        )
    chosen = None if profile is None else ClusterProfile.resolve(profile)
    calibration = Calibration(
        sources=tuple(parse_sources(calibration_text or ["self"])),
        samples=samples,
        length=length,
        profile=chosen,
        save=options.share("--save", save),
        seed=seed,
    )
    if text is not None:
        require_unseen(text, calibration.sources, EvaluationError)
    options.keep_inputs(
        [out / name for name in _FILES],
        [model, profile, text, data, device_map, *(source.name for source in calibration.sources)],
    )
    sources = task_sources(names, data, text, seed)
    lengths = None if recall_lengths is None else parse_lengths(recall_lengths)
    documents = recall_text(data, text) if RECALL in names else []
    if chosen is not None:
        require_fit(model, chosen, trust_remote_code=trust_remote_code)
    require_readable(model, [length], trust_remote_code=trust_remote_code)
    wanted = require_lengths(model, names, lengths, trust_remote_code=trust_remote_code)
    studied = (length or LENGTH) if compare is not None else 0
    load = partial(
        load_model, model, dtype, device, trust_remote_code=trust_remote_code, placement=placement,
        work=reading_work(wanted, batch_size, studied, gradients=compare is not None),
    )  # fmt: skip
    if engine == VLLM:
        load = partial(
            load_skeleton, model, resolve_dtype(dtype, served_device()),
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        rows = served_names(compare, chosen is not None, note)
    with progress_bar(f"loading {model}", quiet=quiet):
        loaded, tokenizer = load()
    if chosen is not None:  # of a .gguf file it is known only now
        chosen.check(describe(loaded))
    if RECALL in names:
        sources += recall_sources(loaded, tokenizer, documents, lengths, recall_cases, seed)
    served = None
    if engine == VLLM:
        served = Served(
            model, loaded, None if chosen is None else (str(profile), chosen), tensor_parallel,
            batch_size, longest_text(sources), trust_remote_code,
        )  # fmt: skip
        served.check()
    else:
        rows = comparator_names(compare, chosen, loaded, note)
    what = Evaluation(
        model=Path(model).name,
        names=rows,
        sources=sources,
        out=out,
        asked=calibration.asked(),
        limit=limit,
        batch_size=batch_size,
        seed=seed,
    )
    with progress_bar("starting", quiet=quiet) as bar:
        table = evaluate(
            loaded,
            tokenizer,
            what,
            partial(prepare, loaded, tokenizer, calibration, bar.tell)
            if served is None
            else served.comparators,
            processes=Processes(jobs, load) if jobs > 1 else None,
            served=served,
            progress=bar.tell,
            on_redo=lambda path, why: note(f"measured anew: {path}: {why}"),
        )
    shown = Output(as_json, quiet)
    shown.give(lambda: json.loads((out / "results.json").read_bytes()))
    for made in rich_tables(table):
        shown.say(render(made, width=180))
    shown.say(LEGEND)
    shown.say(f"results written to {out / 'results.json'} and {out / 'table.md'}")


def _check_unused(context: typer.Context, compare: str | None, tasks: Sequence[str]) -> None:
    """Refuse options without which the table would be the same.

    Raises:
        EvaluationError: names them.
    """
    from chai_attention.evaluation.tasks import RECALL

    fit = options.given(context, "save", "calibration_text", "samples", "length")
    if compare is None and fit:
        raise EvaluationError(
            f"{', '.join(fit)} fits comparators: name some with --compare, or leave it out"
        )
    asked = options.given(context, "recall_lengths", "recall_cases")
    if asked and RECALL not in tasks:
        raise EvaluationError(f"{', '.join(asked)} goes with --tasks {RECALL}")


def _check_engine(context: typer.Context, engine: str) -> None:
    """Refuse options that the engine knows nothing of.

    Raises:
        EvaluationError: names them.
    """
    if engine not in (VLLM, "transformers"):
        raise EvaluationError(f"--engine is transformers or vllm, not {engine!r}")
    if engine != VLLM and (asked := options.given(context, "tensor_parallel")):
        raise EvaluationError(f"{asked[0]} goes with --engine vllm")
    for names, reason in _NOT_SERVED.items():
        if engine == VLLM and (asked := options.given(context, *names)):
            raise EvaluationError(f"leave out {', '.join(asked)} with --engine vllm: {reason}")
