"""The paper's large models at their size, with random weights: calibration and speed.

Weights are made on the devices, divided by a device map; nothing is written but results. Each
model's parts, in this order: times of unfused and fused attention, of a schedule like the
published ones and of heads like those of the default recipe; then evidence by gradients, as `chai
calibrate` collects it. Results are written after each part, and parts that are there are left out,
so that a run that was stopped goes on.

    python benchmarks/large_models.py --out results --total 240
    python benchmarks/large_models.py --out results --model llama-33b --part speed
    python benchmarks/large_models.py --out results --table
    python benchmarks/large_models.py --out /tmp/tiny --tiny       # on a CPU, to try the script
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from chai_attention.benchmarking.ceilings import Ceilings, measure_ceilings
from chai_attention.benchmarking.memory import peaks_of_gpus, release, reset_peak
from chai_attention.benchmarking.model import (
    CLUSTERED,
    FUSED,
    UNFUSED,
    ModelRequest,
    measure_run,
    random_model,
)
from chai_attention.benchmarking.model_checks import check_model
from chai_attention.benchmarking.presets import PRESETS, cut_config
from chai_attention.benchmarking.runners import make_runner
from chai_attention.benchmarking.timing import machine
from chai_attention.calibration.costs import ExactWindow, OffsetStatistics, collect_costs
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.statistics import GramStatistics, observe
from chai_attention.errors import ChaiError
from chai_attention.integrations.transformers.devices import devices_of
from chai_attention.integrations.transformers.placement import Placement
from chai_attention.integrations.transformers.room import Work
from chai_attention.runtime.shape import describe
from large_models_kinds import KINDS, TINY, profile_of
from large_models_table import table
from parts import Parts, load_parts

Told = Callable[[int, int], None]
SPEED, EVIDENCE = "speed", "evidence"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = ("llama-33b", "opt-66b")
START = time.perf_counter()


class OutOfTimeError(Exception):
    """A part has taken as long as it may."""


class Results(Parts):
    """One model's results."""

    def has(self, part: str) -> bool:
        """Whether a part is done."""
        return "stopped" not in self.found.get(part, {"stopped": True})

    def add(self, part: str, value: dict[str, Any], within: str | None = None) -> None:
        """Keep a part and print it."""
        super().add(part, value, within)
        say(f"{part}: {json.dumps(value)}")


def say(text: str) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


def build(name: str, options: argparse.Namespace) -> PreTrainedModel:
    """The model with random weights, over all devices that there are."""
    config = TINY[name]() if options.tiny else PRESETS[name]()
    config.max_position_embeddings = max(config.max_position_embeddings, options.prompt + 64)
    if options.layers is not None:
        config = cut_config(config, options.layers)
    dtype = torch.float32 if options.tiny and DEVICE == "cpu" else torch.bfloat16
    # of the first token; evidence has more room where there are several devices
    work = Work(options.batch * options.prompt, length=options.prompt)
    placement = Placement(options.map)
    return random_model(config, dtype, DEVICE, 0, placement, work.bytes(config, dtype))


def with_peaks(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` returns, or why it failed, and the most bytes that each GPU held meanwhile."""
    release()
    reset_peak(DEVICE)
    try:
        found = run()
    except (ChaiError, torch.OutOfMemoryError) as error:
        found = {"missing": str(error).splitlines()[0], "stopped": True}  # done anew next time
    return found | {"peak_bytes_of": peaks_of_gpus()}


def measure_speed(
    model: PreTrainedModel, name: str, kind: str, ceilings: Ceilings, options: argparse.Namespace
) -> dict[str, Any]:
    """Times of one kind of attention, behind the checks of its profile."""
    profile = profile_of(kind, describe(model))
    request = ModelRequest(
        name, profile, kind, [(options.batch, options.prompt)], options.new_tokens, 0.0
    )
    with torch.inference_mode():
        checks = check_model(model, profile) if kind in KINDS[-2:] else []
        ids = torch.randint(model.config.vocab_size, (options.batch, options.prompt), device=DEVICE)
        run = {UNFUSED: UNFUSED, FUSED: FUSED}.get(kind, CLUSTERED)
        row = measure_run(model, run, request, ids, ceilings)
    steps = make_runner(model, None, 1).steps
    return row | {"run": kind, "checks": checks, "steps": steps}


def measure_evidence(
    model: PreTrainedModel, until: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of what `chai calibrate` learns from text: maps and offsets, then gradient costs.

    A pass that runs out of its half of the time says how many windows it has done.
    """
    shape = describe(model)
    chosen = Settings(save=0.2).resolve(shape)
    exact = [
        ExactWindow(recent, chosen.sinks)
        for recent in options.recent or chosen.recents(options.length)
    ]
    windows = torch.randint(model.config.vocab_size, (options.windows, options.length))
    grams = GramStatistics(shape.layers, shape.heads)
    offsets = OffsetStatistics(shape.layers, shape.heads, exact)
    middle = (time.perf_counter() + until) / 2

    def maps(told: Told) -> None:
        watchers = [grams.add, offsets.add]
        observe(model, windows, watchers, batch_size=options.batch_size, progress=told)

    def gradients(told: Told) -> None:
        learned = [
            replace(window, offsets=table)
            for window, table in zip(exact, offsets.offsets, strict=True)
        ]
        size = max(1, options.batch_size // 2)
        collect_costs(model, windows, "gradient", exact=learned, batch_size=size, progress=told)

    passes = {
        "attention maps": timed(maps, middle),
        "gradient costs": timed(gradients, until),
    }
    result = {"recents": [window.recent for window in exact], "length": options.length}
    if any(found["windows"] < found["of"] for found in passes.values()):
        result["stopped"] = True
    return result | {"passes": passes}


def timed(run: Callable[[Told], None], until: float) -> dict[str, Any]:
    """Windows and seconds of a pass over text, which ends when it is late."""
    begun, seen = time.perf_counter(), list[tuple[float, int, int]]()

    def told(done: int, total: int) -> None:
        seen.append((time.perf_counter() - begun, done, total))
        if done < total and time.perf_counter() > until:
            raise OutOfTimeError

    with suppress(OutOfTimeError):
        run(told)
    (first_s, first, _), (seconds, done, total) = seen[0], seen[-1]
    # without the first batch, which compiles and allocates
    window = round((seconds - first_s) / (done - first), 4) if done > first else None
    return {
        "windows": done, "of": total, "seconds": round(seconds, 2), "first_s": round(first_s, 2),
        "window_s": window,
    }  # fmt: skip


def measure(name: str, options: argparse.Namespace, end: float) -> None:
    """Measure a model's parts that are not there yet, as far as there is time."""
    about = {
        key: getattr(options, key)
        for key in ("tiny", "layers", "batch", "prompt", "new_tokens", "windows", "length",
                    "batch_size", "recent", "map")
    }  # fmt: skip
    results = Results(options.out / f"large-{name}.json", {"model": name, **about})
    parts = options.part or [SPEED, EVIDENCE]
    wanted = [f"{SPEED} {kind}" for kind in KINDS] if SPEED in parts else []
    wanted += [EVIDENCE] if EVIDENCE in parts else []
    if all(results.has(part) for part in wanted):
        return
    start = time.perf_counter()
    try:
        model = build(name, options)
    except ChaiError as error:
        results.add("machine", {**machine(DEVICE), "missing": str(error)})
        return
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
    results.add("machine", {
        **machine(DEVICE), "devices": [str(device) for device in devices_of(model)],
        "build_s": round(time.perf_counter() - start, 1), "held_bytes_of": peaks_of_gpus(),
    })  # fmt: skip
    ceilings = measure_ceilings(DEVICE, model.dtype, 0.2)
    results.add("ceilings", {"gb_s": ceilings.read_gb_s, "tflop_s": ceilings.matmul_tflop_s})
    for part in wanted:
        if results.has(part):
            continue
        until = min(time.perf_counter() + options.limit, end)
        if until - time.perf_counter() < options.least:
            say(f"no time left for {name}, {part}")
            continue
        kind = part.removeprefix(f"{SPEED} ")
        results.add(part, with_peaks(
            partial(measure_evidence, model, until, options)
            if kind == EVIDENCE
            else partial(measure_speed, model, name, kind, ceilings, options)
        ))  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; tiny ones have sizes for a CPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--part", action="append", choices=[SPEED, EVIDENCE])
    parser.add_argument("--map", default="balanced", help="accelerate's word for a device map")
    parser.add_argument("--layers", type=int, help="build so many of the layers")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, help="tokens; 2048")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--windows", type=int, help="of calibration text; 32")
    parser.add_argument("--length", type=int, help="tokens of a window; 1024")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a forward pass")
    parser.add_argument("--recent", type=int, action="append", help="exact windows; all of chai's")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds of a part")
    parser.add_argument(
        "--least", type=float, default=4.0, help="seconds that a part is begun with"
    )
    parser.add_argument("--total", type=float, default=3600.0, help="seconds of all")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    options = parser.parse_args(arguments)
    for name, full, tiny in (("prompt", 2048, 40), ("windows", 32, 6), ("length", 1024, 48)):
        if getattr(options, name) is None:
            setattr(options, name, tiny if options.tiny else full)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write a file per model and a table of all."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    end = START + options.total
    if not options.table:
        for name in options.model or MODELS:
            measure(name, options, end)
            release()
    files = [options.out / f"large-{name}.json" for name in MODELS]
    text = table([load_parts(file) for file in files if file.is_file()])
    (options.out / "large-models.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
