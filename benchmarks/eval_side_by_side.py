r"""`chai eval` spread over processes and GPUs: the same folder, files and table, sooner.

An evaluation is bound by launching small kernels from Python, so one process leaves a GPU idle
most of the time. Here every comparator and task is a job of its own, dealt to ``--jobs`` processes
on all GPUs there are. What learns from text is fitted once, in the first process, and handed to
those that score it, as two fits on a GPU may differ by rounding. At the end `evaluate` itself
makes the table of what it finds. A run that was stopped goes on, here or by `chai eval`.

    python benchmarks/eval_side_by_side.py MODEL --profile FILE --compare all --data ITEMS \
        --calibration-text FILE --save 10% --jobs 16 --out OUT
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chai_attention.calibration.evidence import quiet
from chai_attention.calibration.sources import parse_sources
from chai_attention.cli import options
from chai_attention.evaluation.comparators import registry
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.comparators.chai import RECIPES
from chai_attention.evaluation.evaluate import Evaluation, Prepare, asked_of, evaluate
from chai_attention.evaluation.preparation import Calibration, comparator_names, prepare
from chai_attention.evaluation.runs import RunFolder
from chai_attention.evaluation.scorer import Scorer, run_settings
from chai_attention.evaluation.tasks import task_names, task_sources
from chai_attention.integrations.transformers.loading import load_model
from chai_attention.profile import ClusterProfile

LEARNING = {*RECIPES, "dejavu-10", "dejavu-30", "dejavu-50"}
# without a profile they take that of "default"
BORROWING = {"random", "chai+float8", "chai+quant8", "chai+quant4"}


@dataclass(frozen=True)
class Setup:
    """What every process makes for itself from the command's arguments."""

    model: Any
    tokenizer: Any
    what: Evaluation
    calibration: Calibration


def main() -> None:
    """Score what is missing, then make the table."""
    args = _arguments()
    here = _set_up(args, print)
    ready = prepare(here.model, here.tokenizer, here.calibration, quiet)
    todo = _missing(here)
    if todo:
        _spread(args, here, todo, ready)
    evaluate(
        here.model,
        here.tokenizer,
        here.what,
        ready,
        on_redo=lambda path, why: print(f"{path}: {why}"),
    )
    print(f"table in {args.out / 'table.md'}")


def _set_up(args: argparse.Namespace, say: Callable[[str], None]) -> Setup:
    """Load model and items; ``say`` is told which comparators are left out."""
    chosen = None if args.profile is None else ClusterProfile.resolve(args.profile)
    calibration = Calibration(
        sources=tuple(parse_sources(args.calibration_text or ["self"])),
        samples=args.samples,
        length=args.length,
        profile=chosen,
        save=options.share("--save", args.save),
        seed=args.seed,
    )
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    what = Evaluation(
        model=Path(args.model).name,
        names=comparator_names(args.compare, chosen, model, say),
        sources=task_sources(task_names(args.tasks), args.data, args.text, args.seed),
        out=args.out,
        asked=calibration.asked(),
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    return Setup(model, tokenizer, what, calibration)


def _missing(here: Setup) -> list[tuple[str, str]]:
    """Comparators and tasks without a result, those that take longest first."""
    what = here.what
    run = run_settings(here.model, what.model, what.batch_size, what.seed)
    folder = RunFolder(what.out, lambda path, why: print(f"{path}: {why}"))
    jobs = [
        (name, source)
        for name in what.names
        for source in what.sources
        if folder.get(run, source.settings(what.limit), asked_of(name, what)) is None
    ]
    jobs.sort(key=lambda job: (job[0] in registry.RIVALS, len(job[1].rows or ())), reverse=True)
    return [(name, source.name) for name, source in jobs]


def _spread(
    args: argparse.Namespace, here: Setup, todo: Sequence[tuple[str, str]], ready: Prepare
) -> None:
    """Score jobs in processes; those whose comparator has to learn wait until it has."""
    late = LEARNING | (BORROWING if here.calibration.profile is None else set())
    context = multiprocessing.get_context("spawn")
    numbers: Any = context.Queue()
    for number in range(args.jobs):
        numbers.put(number)
    pool = ProcessPoolExecutor(
        min(args.jobs, len(todo)), context, initializer=_start, initargs=(args, numbers)
    )
    futures: dict[Future[float], str] = {}
    try:
        for name, task in todo:
            if name not in late:
                futures[pool.submit(_score, name, task, None)] = f"{name} {task}"
        learners = list(dict.fromkeys(name for name, _ in todo if name in late))
        fitted: Mapping[str, Comparator] = ready(learners) if learners else {}
        pickled = {name: pickle.dumps(method) for name, method in fitted.items()}
        for name, task in todo:
            if name in late:
                futures[pool.submit(_score, name, task, pickled[name])] = f"{name} {task}"
        failed = 0
        for done, future in enumerate(as_completed(futures), 1):
            try:
                said = f"{future.result():.0f} s"
            except Exception as error:  # the others go on, and their results are kept
                said = f"{type(error).__name__}: {error}"
                failed += 1
            print(f"[{done}/{len(futures)}] {futures[future]}: {said}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        sys.exit(f"{failed} of {len(futures)} jobs failed, no table was made")


# ---- in the processes

_here: dict[str, Any] = {}


def _start(args: argparse.Namespace, numbers: Any) -> None:
    """Load model and items, once per process, and take a GPU in turn."""
    number = numbers.get()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    here = _set_up(args, lambda message: None)
    run = run_settings(here.model, here.what.model, here.what.batch_size, here.what.seed)
    scorer = Scorer(here.model, here.tokenizer, run, here.what.limit)
    _here.update(setup=here, scorer=scorer)


def _score(name: str, task: str, made: bytes | None) -> float:
    """Score one comparator on one task and write its result; seconds it took."""
    start = time.perf_counter()
    here: Setup = _here["setup"]
    what, calibration = here.what, here.calibration
    method = (
        registry.comparators(
            [name],
            model=here.model,
            tokens=(),
            profile=calibration.profile,
            save=calibration.save,
            seed=calibration.seed,
        )[name]
        if made is None
        else pickle.loads(made)
    )
    source = next(source for source in what.sources if source.name == task)
    result = _here["scorer"].score(method, asked_of(name, what), source, lambda done, total: None)
    RunFolder(what.out).put(result)
    return time.perf_counter() - start


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tasks", default="paper")
    parser.add_argument("--profile")
    parser.add_argument("--compare")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--text")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save")
    parser.add_argument("--calibration-text", action="append")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=4, help="processes, over all GPUs together")
    return parser.parse_args()


if __name__ == "__main__":
    main()
