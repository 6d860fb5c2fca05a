"""`evaluate`: score comparators on the same items; a stopped run continues with what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.runs import Redo, Result, RunFolder
from chai_attention.evaluation.scorer import MHA, Scorer, run_settings
from chai_attention.evaluation.side_by_side import Job, Processes, score_side_by_side
from chai_attention.evaluation.table import build_table, write_table
from chai_attention.evaluation.tasks import TaskSource
from chai_attention.integrations.lm_eval import require
from chai_attention.progress import Progress, quiet

if TYPE_CHECKING:
    from chai_attention.evaluation.served import Served

Prepare = Callable[[Sequence[str]], Mapping[str, Comparator]]


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        model: the model's name, for the record.
        names: comparators; MHA, to which all others are compared, is added in front.
        sources: the tasks, from `task_sources`.
        out: folder of results; those that are there and fit are kept.
        asked: what comparators are prepared with (profile, calibration text, saving), as digests
            and numbers: it identifies their results before they are prepared.
        limit: items of every task; None for all.
        batch_size: rows of a forward.
        seed: of everything random.
    """

    model: str
    names: Sequence[str]
    sources: Sequence[TaskSource]
    out: Path
    asked: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 16
    seed: int = 0


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    what: Evaluation,
    prepare: Prepare,
    *,
    processes: Processes | None = None,
    served: Served | None = None,
    progress: Progress = quiet,
    on_redo: Redo = lambda path, reason: None,
) -> dict[str, Any]:
    """Score every comparator on every task and write the table.

    Each result is written as soon as it is complete; a run that is stopped goes on with those
    that are missing, damaged or of other settings. Two runs with the same settings on the same
    machine write the same files.

    Args:
        model: a causal language model, in evaluation mode, not enabled.
        tokenizer: its tokenizer.
        what: tasks, comparators and settings.
        prepare: makes comparators by name, fitted where they need it; it is called once, with
            those that have something left to score.
        processes: that score side by side; None: this one scores.
        served: vLLM, which then scores all of it, and ``model`` needs no weights; its engine is
            ended here. None: transformers does.
        progress: called with (what is going on, items done, items in all).
        on_redo: called with a file that cannot be used and the reason.

    Returns:
        The table, as in results.json (see `build_table`).

    Raises:
        EvaluationError: no tasks, a comparator that ``prepare`` does not make, what lm-eval
            cannot run, or a folder with results of another run (model, weights, dtype, device,
            batch size, seed or releases differ).
    """
    require()
    if not what.sources:
        raise EvaluationError("an evaluation needs at least one task")
    if what.limit is not None and what.limit < 1:
        raise EvaluationError(f"a limit is a number of items, not {what.limit}")
    names = tuple(dict.fromkeys((MHA, *what.names)))
    folder = RunFolder(what.out, on_redo)
    settings_of = partial(run_settings, model) if served is None else served.run_settings
    run = settings_of(what.model, what.batch_size, what.seed)
    folder.require_run(run)
    results: dict[tuple[str, str], Result] = {}
    tasks = {source.name: source.settings(what.limit) for source in what.sources}
    for name in names:
        for task, settings in tasks.items():
            found = folder.get(run, settings, asked_of(name, what))
            if found is not None:
                results[name, task] = found
    waiting = [name for name in names if any((name, task) not in results for task in tasks)]
    if waiting:
        progress("preparing comparators", 0, 1)
        made = prepare(waiting)
        if missing := [name for name in waiting if name not in made]:
            raise EvaluationError(f"no comparator {', '.join(missing)}")
        for name in waiting:
            for task, settings in tasks.items():
                # results were looked up by what was asked for; now the settings are known, too
                asked = {**asked_of(name, what), "settings": made[name].settings()}
                if (name, task) in results and folder.get(run, settings, asked) is None:
                    del results[name, task]
        jobs = [
            Job(made[name], asked_of(name, what), source)
            for name in waiting
            for source in what.sources
            if (name, source.name) not in results
        ]
        with served or nullcontext():
            scorer = (
                Scorer(model, tokenizer, run, what.limit)
                if served is None
                else served.scorer(tokenizer, run, what.limit)
            )
            if processes is None:
                scored = _in_turn(scorer, jobs, progress)
            else:
                scored = _side_by_side(scorer, processes, run, what.limit, jobs, progress)
            for result in scored:
                folder.put(result)
                results[result.comparator, result.task] = result
    table = build_table(run, names, tuple(tasks), results)
    write_table(table, what.out)
    return table


def _in_turn(scorer: Scorer, jobs: Sequence[Job], progress: Progress) -> Iterator[Result]:
    done, total = 0, sum(scorer.items(job.source) for job in jobs)
    for job in jobs:
        count = scorer.items(job.source)

        def report(part: int, whole: int, title: str = job.title) -> None:
            progress(title, done + count * part // max(1, whole), total)  # noqa: B023

        report(0, 1)
        yield scorer.score(job.method, job.asked, job.source, report)
        done += count


def _side_by_side(
    scorer: Scorer,
    processes: Processes,
    run: Mapping[str, Any],
    limit: int | None,
    jobs: Sequence[Job],
    progress: Progress,
) -> Iterator[Result]:
    items = {job.source.name: scorer.items(job.source) for job in jobs}
    # what acts on a cache is scored one context at a time
    longest = sorted(jobs, key=lambda job: (not job.method.needs_cache, -items[job.source.name]))
    done, total = 0, sum(items[job.source.name] for job in jobs)
    progress("side by side", done, total)
    for result in score_side_by_side(processes, run, limit, longest):
        done += items[result.task]
        progress(f"done: {result.comparator}: {result.task}", done, total)
        yield result


def asked_of(name: str, what: Evaluation) -> dict[str, Any]:
    """What identifies a comparator's results before it is prepared, by its name.

    MHA is the same whatever is asked of the others.
    """
    return {"name": name, "asked": {} if name == MHA else dict(what.asked)}
