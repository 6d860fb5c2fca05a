"""Scoring in processes side by side.

One process that evaluates a small model leaves a GPU idle most of the time. Here every pair of a
comparator and a task is a job, and several processes, each with the model, work on the jobs.
"""

from __future__ import annotations

import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import active_children, get_context, resource_tracker
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.errors import ChaiError, EvaluationError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.runs import Result
from chai_attention.evaluation.scorer import Scorer, run_settings
from chai_attention.evaluation.tasks import TaskSource


@dataclass(frozen=True)
class Processes:
    """Processes that score, over all GPUs there are.

    Attributes:
        count: how many.
        load: makes the model that is evaluated, and its tokenizer, in each of them; on a GPU, on
            the current one. It can be pickled.
    """

    count: int
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Job:
    """One comparator, prepared, what it was asked for, and one task."""

    method: Comparator
    asked: Mapping[str, Any]
    source: TaskSource

    @property
    def title(self) -> str:
        """What a progress bar shows."""
        return f"{self.method.name}: {self.source.name}"


def score_side_by_side(
    processes: Processes, run: Mapping[str, Any], limit: int | None, jobs: Sequence[Job]
) -> Iterator[Result]:
    """Score jobs, and yield results as they come.

    However this ends, its processes end with it.

    Args:
        processes: that do it.
        run: from `run_settings`.
        limit: items of every task; None for all.
        jobs: those that take longest first.

    Raises:
        EvaluationError: ``processes.load`` makes another model, or a process was killed.
        ChaiError: from a job.
        RuntimeError: another error in a process, with its traceback.
    """
    context, waiting = get_context("spawn"), iter(jobs)
    count, others = min(processes.count, len(jobs)), set(active_children())
    given = (context.Value("i", 0), processes, dict(run), limit)
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=given)
    doing: dict[Future[Result], str] = {}

    def submit(job: Job) -> None:
        # by pickle itself: torch would share tensors' memory between the processes
        with _no_interrupts():
            doing[pool.submit(_score, pickle.dumps(job))] = job.title

    try:
        for job in islice(waiting, count):
            submit(job)
        while doing:
            done, _ = wait(doing, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    found = future.result()
                except BrokenProcessPool:
                    raise EvaluationError(
                        f"a process was killed during {', '.join(dict.fromkeys(doing.values()))}: "
                        "too many for this memory? Results so far are kept; take fewer (--jobs)"
                    ) from None
                del doing[future]
                for job in islice(waiting, 1):
                    submit(job)
                yield found
    finally:
        for child in set(active_children()) - others:
            child.terminate()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Start processes that never see Ctrl-C: the one that started them ends them.

    They inherit what is blocked from their first instruction on; ignoring it only once they run
    would leave the seconds in which they import. Here an interrupt waits until the end.
    """
    resource_tracker.ensure_running()  # its start would let interrupts in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# of a process that scores: what it was given, and its scorer once there is a job for it
_given: tuple[Any, ...] = ()
_scorers: list[Scorer] = []


def _begin(numbers: Any, *given: Any) -> None:
    """Be one of the processes, each with a number of its own."""
    global _given
    with numbers.get_lock():
        _given = (numbers.value, *given)
        numbers.value += 1


def _score(pickled: bytes) -> Result:
    """Do one job; errors that are no `ChaiError` come back as text, with their traceback."""
    try:
        if not _scorers:
            _scorers.append(_scorer(*_given))
        job: Job = pickle.loads(pickled)
        return _scorers[0].score(job.method, job.asked, job.source, lambda done, total: None)
    except ChaiError:
        raise
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None


def _scorer(number: int, processes: Processes, run: Mapping[str, Any], limit: int | None) -> Scorer:
    torch.set_num_threads(max(1, torch.get_num_threads() // processes.count))
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    model, tokenizer = processes.load()
    if run_settings(model, run["model"], run["batch_size"], run["seed"]) != dict(run):
        raise EvaluationError("what a process loaded is not the model that is evaluated")
    return Scorer(model, tokenizer, run, limit)
