"""Scoring in processes side by side.

An evaluation of a small model waits for Python most of the time: one process leaves a GPU idle.
Here every comparator and task is a job of its own, dealt to processes that have a model each.
"""

from __future__ import annotations

import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, cast

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
    context, waiting = get_context("spawn"), deque(jobs)
    doing: dict[Any, str] = {}  # by the pipe to a process
    with ExitStack() as ends:
        for number in range(min(processes.count, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, number, processes, dict(run), limit), daemon=True
            )
            with _no_interrupts():
                process.start()
            theirs.close()
            ends.callback(process.join)
            ends.callback(process.terminate)
            doing[ours] = "its start"
        while doing:
            for pipe in cast("list[Any]", wait(list(doing))):
                try:
                    found = pipe.recv()
                except EOFError:
                    raise EvaluationError(
                        f"a process was killed during {doing[pipe]}: too many for this memory? "
                        "Results so far are kept; take fewer (--jobs)"
                    ) from None
                if isinstance(found, Exception):
                    raise found
                if waiting:
                    job = waiting.popleft()
                    doing[pipe] = job.title
                    # by pickle itself: torch would share tensors' memory between the processes
                    pipe.send_bytes(pickle.dumps(job))
                else:
                    del doing[pipe]
                if found is not None:
                    yield found


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


def _work(
    pipe: Connection, number: int, processes: Processes, run: Mapping[str, Any], limit: int | None
) -> None:
    """Be one of the processes: say None when ready, then a result for every job."""
    try:
        scorer = _scorer(number, processes, run, limit)
        found: Result | None = None
        while True:
            pipe.send(found)
            job: Job = pickle.loads(pipe.recv_bytes())
            found = scorer.score(job.method, job.asked, job.source, lambda done, total: None)
    except (EOFError, BrokenPipeError):  # nobody is left to work for
        return
    except ChaiError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


def _scorer(number: int, processes: Processes, run: Mapping[str, Any], limit: int | None) -> Scorer:
    torch.set_num_threads(max(1, torch.get_num_threads() // processes.count))
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    model, tokenizer = processes.load()
    if run_settings(model, run["model"], run["batch_size"], run["seed"]) != dict(run):
        raise EvaluationError("what a process loaded is not the model that is evaluated")
    return Scorer(model, tokenizer, run, limit)
