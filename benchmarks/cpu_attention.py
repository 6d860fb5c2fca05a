"""One layer's attention on this CPU: baselines, our two implementations, and which one is chosen.

    taskset -c 0,1 env OMP_NUM_THREADS=2 python benchmarks/cpu_attention.py --out cpu_attention.json

LLaMA-7B's heads: 8 clusters without a window, with one of 32 + 4, and 8 clusters beside 12
streaming heads with one of 128 + 4. Every call is checked against the float64 definition first.
Calls take turns, so that other work on the machine slows all of them; figures are medians and the
shortest times. The baseline is the fastest attention without clusters, by its median. On a machine
that does other work, ``--one-thread`` counts the time of one thread alone, waiting left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chai_attention.benchmarking.baselines import baselines
from chai_attention.benchmarking.cases import AttentionShape, parse_case
from chai_attention.benchmarking.clustered import (
    Layout,
    clustered_call,
    random_inputs,
    with_streaming,
)
from chai_attention.benchmarking.correctness import accuracy, require_correct
from chai_attention.benchmarking.timing import machine
from chai_attention.errors import ChaiError
from chai_attention.membership import Membership
from chai_attention.ops import choice, cpu_attention
from chai_attention.results import write_result

SHAPE = AttentionShape("llama-7b", 32, 32, 128)
CASES = ("decode:1x8192", "prefill:1x2048")
KINDS = {  # clusters, streaming heads, layout
    "8 clusters": (8, 0, Layout()),
    "8 clusters, 32+4": (8, 0, Layout(recent=32, sinks=4)),
    "8 K / 20 V heads, 128+4": (8, 12, Layout(recent=128, sinks=4)),
}
Clock = Callable[[], float]
CODES = (choice.BLOCKED, choice.TORCH)
SLOW = "SDPA math"  # never the fastest, and many times slower in decode
WARM = 1


def main() -> None:
    """Measure and print; write everything to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one-thread", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    clock = time.perf_counter
    if given.one_thread:
        torch.set_num_threads(1)
        clock = time.thread_time
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "machine": machine("cpu"), "clock": clock.__name__, "baselines": [], "results": [],
    }  # fmt: skip
    with torch.inference_mode():
        for text in CASES:
            for dtype in (torch.float32, torch.bfloat16):
                measure(text, dtype, given.rounds, clock, report)
    if given.out is not None:
        write_result(given.out, report, ChaiError)


def measure(
    text: str, dtype: torch.dtype, rounds: int, clock: Clock, report: dict[str, Any]
) -> None:
    """One case in one dtype."""
    case = parse_case(text)
    about = {"case": str(case), "dtype": str(dtype).removeprefix("torch.")}
    inputs = random_inputs(case, SHAPE, dtype, "cpu")
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    plain = Membership.identity(SHAPE.heads)
    for item in baselines("cpu"):
        if item.name == SLOW:
            continue
        call = item.prepare(inputs)
        if accuracy(call(), inputs, plain, Layout()).is_correct:
            calls["", item.name] = call
    errors = {}
    for name, (clusters, streaming, layout) in KINDS.items():
        member = with_streaming(SHAPE.heads, clusters, 1, SHAPE.kv_heads, streaming)
        for code in CODES:
            call = by(code, clustered_call(inputs, member, layout))
            found = accuracy(call(), inputs, member, layout)
            errors[name, code] = require_correct(f"{name}, {code}, {case}", found).error
            calls[name, code] = call
    times = in_turns(calls, rounds, clock)
    medians = {key: statistics.median(found) for key, found in times.items()}
    base = min((key for key in calls if not key[0]), key=medians.__getitem__)
    kind = choice.kind_of(inputs.query, case.tokens, clustered=True)
    chosen = choice.chosen(kind)
    print(f"\n{case}, {about['dtype']}: baseline {base[1]}, auto takes {chosen}")
    for (name, code), seconds in times.items():
        row = {
            **about, "us": medians[name, code] * 1e6, "best_us": min(seconds) * 1e6,
            "repeats": len(seconds),
        }  # fmt: skip
        if not name:
            report["baselines"].append({**row, "baseline": code})
        else:
            report["results"].append(
                {
                    **row, "kind": name, "code": code, "chosen": code == chosen,
                    "baseline": base[1], "baseline_us": medians[base] * 1e6,
                    "speedup": medians[base] / medians[name, code],
                    "best_speedup": min(times[base]) / min(found), "error": errors[name, code],
                }
            )  # fmt: skip
        ratio = medians[base] / medians[name, code]
        print(
            f"  {name or 'without clusters':26} {code:18} {medians[name, code] * 1e3:9.2f} ms"
            f" (shortest {min(found) * 1e3:.2f}) {ratio:6.2f}x"
        )


def by(code: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``call`` by one of the codes."""

    def run() -> Tensor:
        with cpu_attention(code):
            return call()

    return run


def in_turns(
    calls: dict[tuple[str, str], Callable[[], Tensor]], rounds: int, clock: Clock
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each call, round after round."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(WARM + rounds):
        for key, call in calls.items():
            start = clock()
            call()
            if turn >= WARM:
                times[key].append(clock() - start)
    return times


if __name__ == "__main__":
    main()
