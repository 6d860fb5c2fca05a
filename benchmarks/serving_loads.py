"""The workloads of the serving benchmark, sent to an engine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count as counting
from typing import Any

from serving_jobs import params
from serving_kinds import EIGHT, SIXTY, THIRTY

Requests = list[tuple[int, int]]  # tokens of each one's prompt and output
_seeds = counting()  # no two prompts begin alike, as prefixes are cached


@dataclass(frozen=True)
class Case:
    """A batch of prompts that come at once.

    Attributes:
        batch: requests.
        length: tokens of each, with the new ones.
        new: tokens that each gets; with 1 only the first token is timed.
        runs: how often, of which the first of several does not count.
        turn: tokens of each prompt that follow a chat's earlier turns, which the prefix cache
            holds; 0 if it holds nothing.
    """

    batch: int
    length: int
    new: int
    runs: int
    turn: int = 0

    @property
    def name(self) -> str:
        """As tables have it."""
        if self.turn:
            return f"{self.batch} x {self.turn:,} behind {self.cached:,}"
        return f"{self.batch} x {self.length:,}"

    @property
    def prompt(self) -> int:
        """Tokens of each prompt."""
        return self.length - self.new

    @property
    def cached(self) -> int:
        """Those of them that the prefix cache holds."""
        return self.prompt - self.turn if self.turn else 0


TURN = Case(1, 8192 + 41, 1, 31, turn=40)  # mostly the host's time: single runs differ by half


@dataclass(frozen=True)
class Scale:
    """Sizes of all workloads, for GPUs or, to try it all, for a CPU.

    Attributes:
        cases: batches, the quick ones first.
        chats: requests with lengths like those of chats: log-normal, of ShareGPT's order.
        long: requests with long prompts.
        large: requests for models with learned positions for 2,048 tokens.
        shared: requests behind one system prompt.
        system: its tokens.
        shrink: what lengths of chats and long prompts are divided by.
        context: length of requests by which capacity is told.
        longest: ``max_model_len``.
        budget: ``max_num_batched_tokens``.
        most: ``max_num_seqs``.
        loads: what throughput is measured with.
    """

    cases: tuple[Case, ...] = (
        Case(1, 2048, 40, 11), TURN, Case(14, 8192, 40, 2), Case(16, 8192, 1, 2),
        Case(1, 32768, 40, 3),
    )  # fmt: skip
    chats: int = 800
    long: int = 36
    large: int = 96
    shared: int = 200
    system: int = 1000
    shrink: int = 1
    context: int = 8192
    longest: int = 32768
    budget: int = 8192
    most: int = 640
    loads: tuple[str, ...] = ("chats", "long prompts", "shared prompt")


LOADS = ("chats", "long prompts")
SHARED = "shared prompt"
LARGE = "batch"
SMALL_BATCH = "small batch"  # its first quarter, for a model that leaves little room on its card
FULL = Scale()
SMALL = Scale(
    cases=(
        Case(1, 200, 4, 2), Case(1, 269, 1, 2, turn=12), Case(3, 300, 4, 2), Case(4, 300, 1, 2),
        Case(1, 500, 4, 1),
    ),
    chats=12, long=3, shared=6, large=6, system=200, shrink=16, context=512, longest=512,
    budget=256, most=8,
)  # fmt: skip
_GROUPED = (Case(1, 2048, 40, 11), TURN, Case(16, 8192, 40, 2), Case(1, 32768, 40, 3))
_GROUPED_SMALL = (Case(1, 200, 4, 2), Case(4, 300, 4, 2), Case(1, 500, 4, 1))
_LARGE = (Case(1, 2048, 40, 6), Case(2, 2048, 40, 4), Case(8, 2048, 40, 3))
_LARGE_SMALL = (Case(1, 200, 4, 2), Case(2, 300, 4, 2), Case(3, 300, 4, 2))


def scale_of(model: str, tiny: bool = False) -> Scale:
    """Sizes for a model of `serving_kinds`."""
    scale = SMALL if tiny else FULL
    if model == EIGHT:
        return replace(scale, cases=_GROUPED_SMALL if tiny else _GROUPED)
    if model in (THIRTY, SIXTY):
        cases = _LARGE_SMALL if tiny else _LARGE
        lengths = {} if tiny else {"context": 2048, "longest": 2048, "most": 128}
        return replace(scale, cases=cases, loads=(LARGE, SMALL_BATCH), **lengths)
    return scale


def prompts_of(sizes: Sequence[int], vocabulary: int) -> list[dict[str, list[int]]]:
    """Random prompts, none of which was there before."""
    chosen = random.Random(next(_seeds))
    tokens = range(3, vocabulary)
    return [{"prompt_token_ids": chosen.choices(tokens, k=size)} for size in sizes]


def requests_of(name: str, scale: Scale) -> Requests:
    """Lengths of a load, the same for every engine."""
    chosen, parts = random.Random(7), scale.shrink
    if name == "long prompts":
        sizes = [(chosen.randint(4096, 7600), chosen.randint(128, 320)) for _ in range(scale.long)]
        return [(a // parts, max(2, b // parts)) for a, b in sizes]
    if name in (LARGE, SMALL_BATCH):
        sizes = [(chosen.randint(1024, 1792), chosen.randint(128, 224)) for _ in range(scale.large)]
        counted = scale.large // (4 if name == SMALL_BATCH else 1)
        return [(a // parts, max(2, b // parts)) for a, b in sizes[:counted]]
    number = scale.chats if name == "chats" else scale.shared
    drawn = [
        (chosen.lognormvariate(4.9, 1.0), chosen.lognormvariate(5.1, 0.6)) for _ in range(number)
    ]
    sizes = [(max(4, min(2048, int(a))), max(4, min(768, int(b)))) for a, b in drawn]
    return [(max(4, a // parts), max(4, b // parts)) for a, b in sizes]


def run_case(llm: Any, case: Case, vocabulary: int) -> dict[str, Any]:
    """Median times of a batch."""
    runs = [_run(llm, case, vocabulary) for _ in range(case.runs)]
    counted = runs[1:] or runs
    median = {
        key: round(statistics.median(run[key] for run in counted), 3)
        for key in counted[0]
        if key != "steps"
    }
    return {**median, "runs": runs}


def _run(llm: Any, case: Case, vocabulary: int) -> dict[str, float]:
    """Times of a batch, once the prefix cache holds what it should of it."""
    prompts = prompts_of([case.prompt] * case.batch, vocabulary)
    if case.turn:
        told = [{"prompt_token_ids": x["prompt_token_ids"][: case.cached]} for x in prompts]
        _batch(llm, told, 1)
    return _batch(llm, prompts, case.new)


def _batch(llm: Any, prompts: list[dict[str, list[int]]], count: int) -> dict[str, float]:
    """Generate with prompts that come at once.

    Returns:
        ``ttft_ms`` until all rows have a token, ``tpot_ms`` of the steps between that and the first
        row's end, and the number of these ``steps``; ``total_ms``.
    """
    engine = llm.llm_engine
    start = time.perf_counter()  # the engine, another process, begins with the first one
    for row, prompt in enumerate(prompts):
        engine.add_request(f"{next(_seeds)}-{row}", prompt, params(count))
    seen: dict[str, int] = {}
    first = last = now = 0.0
    steps = 0
    while engine.has_unfinished_requests():
        done = engine.step()
        now = time.perf_counter()
        if not done:
            continue
        for request in done:
            seen[request.request_id] = len(request.outputs[0].token_ids)
        if len(seen) == len(prompts):
            if not first:
                first = last = now
            elif not any(request.finished for request in done) and max(seen.values()) < count:
                steps, last = steps + 1, now
    found = {"ttft_ms": (first - start) * 1e3, "total_ms": (now - start) * 1e3}
    if steps:
        found["tpot_ms"] = (last - first) / steps * 1e3
    return {key: round(value, 3) for key, value in found.items()} | {"steps": steps}


def throughput(llm: Any, name: str, scale: Scale, vocabulary: int) -> dict[str, float]:
    """Tokens per second, altogether and for as long as requests wait."""
    sizes = requests_of(name, scale)
    prompts = prompts_of([length for length, _ in sizes], vocabulary)
    spent, saturated, _ = _serve(llm, prompts, [output for _, output in sizes])
    read, written = (sum(each) for each in zip(*sizes, strict=True))
    return {
        "seconds": round(spent, 2),
        "output_tokens_s": round(written / spent, 1),
        "all_tokens_s": round((read + written) / spent, 1),
        "saturated_seconds": round(saturated[0], 2),
        "saturated_output_tokens_s": round(saturated[1] / max(saturated[0], 1e-9), 1),
    }


def shared_prompt(llm: Any, scale: Scale, vocabulary: int) -> dict[str, float]:
    """Chats behind one system prompt: with what the cache holds of it, and with nothing of it.

    Returns:
        ``output_tokens_s`` and ``uncached_tokens_s`` without hits, ``cached`` tokens of a request
        in the mean, and ``equal``, the share of tokens up to an answer's first difference from the
        answer without hits. In 16 bits rounding makes differences: compare with stock's.
    """
    sizes = requests_of(SHARED, scale)
    system = prompts_of([scale.system], vocabulary)[0]["prompt_token_ids"]
    prompts = prompts_of([length for length, _ in sizes], vocabulary)
    for prompt in prompts:
        prompt["prompt_token_ids"] = system + prompt["prompt_token_ids"]
    outputs = [output for _, output in sizes]
    spent, _, hit = _serve(llm, prompts, outputs)
    apart, _, missed = _serve(llm, prompts, outputs, skip_reading_prefix_cache=True)
    same = sum(_alike(a[1], b[1]) for a, b in zip(hit, missed, strict=True))
    return {
        "seconds": round(spent, 2),
        "output_tokens_s": round(sum(outputs) / spent, 1),
        "uncached_tokens_s": round(sum(outputs) / apart, 1),
        "cached": round(statistics.mean(cached for cached, _ in hit), 1),
        "equal": round(same / sum(outputs), 4),
        "answers": len(sizes),
        "answers_equal": sum(a[1] == b[1] for a, b in zip(hit, missed, strict=True)),
    }


def _alike(one: list[int], other: list[int]) -> int:
    """Tokens up to the first difference."""
    pairs = zip(one, other, strict=True)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(one))


def _serve(
    llm: Any, prompts: list[dict[str, list[int]]], outputs: Sequence[int], **more: Any
) -> tuple[float, tuple[float, int], list[tuple[int, list[int]]]]:
    """Run requests that come at once.

    Returns:
        Seconds; seconds and written tokens when the last request began; of each request tokens that
        were found in the cache, and those written.
    """
    engine, run = llm.llm_engine, next(_seeds)
    start = time.perf_counter()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        engine.add_request(f"{run}-{row}", prompt, params(output, **more))
    seen: dict[str, int] = {}
    found: dict[str, tuple[int, list[int]]] = {}
    saturated = (0.0, 0)
    while engine.has_unfinished_requests():
        for request in engine.step():
            seen[request.request_id] = len(request.outputs[0].token_ids)
            if request.finished:
                tokens = list(request.outputs[0].token_ids)
                found[request.request_id] = (request.num_cached_tokens or 0, tokens)
        if len(seen) == len(prompts) and not saturated[1]:
            saturated = (time.perf_counter() - start, sum(seen.values()))
    spent = time.perf_counter() - start
    return spent, saturated, [found[f"{run}-{row}"] for row in range(len(prompts))]
