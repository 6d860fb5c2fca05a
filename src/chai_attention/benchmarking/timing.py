"""Time calls, and describe the machine."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

WARM_REPLAYS = 3
LEAST_REPLAYS, MOST_REPLAYS = 12, 100
LEAST_REPEATS, MOST_REPEATS = 5, 50
MOST_ROUNDS = 32
SHORT_US = 2000.0  # a CUDA graph should take this long, so that its launch does not count
LONG_US = 50_000.0  # of calls that take longer, fewer times tell as much
LEAST_LONG = 4


@dataclass(frozen=True)
class Timing:
    """Time of one call.

    Attributes:
        us: median, microseconds.
        iqr_us: interquartile range.
        repeats: how many times it is of.
        best_us: shortest.
    """

    us: float
    iqr_us: float
    repeats: int
    best_us: float


def time_calls(calls: Sequence[Call], device: str, seconds: float) -> Timing:
    """Time one call.

    On CUDA a graph of all calls is replayed, which leaves out what Python takes to launch them.

    Args:
        calls: the same work on different memory, so that on CUDA no call finds its inputs in the
            L2 cache.
        device: "cpu" or "cuda".
        seconds: how long to repeat; at least a few times in any case.
    """
    return _graph(calls, seconds) if device == "cuda" else _host(calls, seconds)


def _host(calls: Sequence[Call], seconds: float) -> Timing:
    """Wall-clock times, one call at a time, after one that does not count."""
    calls[0]()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_REPEATS or (time.perf_counter() < end and len(times) < MOST_REPEATS):
        times.append(pass_us([calls[len(times) % len(calls)]], "cpu"))
    return summary(times)


def _graph(calls: Sequence[Call], seconds: float) -> Timing:
    """Times of a CUDA graph of all calls, divided by their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and makes the tables that are made once
            call()
        once = _events(calls)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    rounds = max(1, min(MOST_ROUNDS, int(SHORT_US / max(once, 1.0))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times: list[float] = []
    warm, least = replays(once)
    end = time.perf_counter() + seconds
    while len(times) < warm + least or (time.perf_counter() < end and len(times) < MOST_REPLAYS):
        times.append(_events([graph.replay]) / (rounds * len(calls)))
    graph.reset()
    return summary(times[warm:])


def replays(us: float) -> tuple[int, int]:
    """How often calls that take so many microseconds together run before they count, and at least.

    Attention to 128k tokens takes a second by some kernels, and warms a GPU up at once.
    """
    return (WARM_REPLAYS, LEAST_REPLAYS) if us < LONG_US else (1, LEAST_LONG)


def pass_us(calls: Sequence[Call], device: str) -> float:
    """Time one pass of calls, launched from Python one after the other.

    Args:
        calls: on CUDA, of more work than it takes to launch them.
        device: "cpu" or "cuda".

    Returns:
        Microseconds of all of them together.
    """
    if device == "cuda":
        return _events(calls)
    begun = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begun) * 1e6


def _events(calls: Sequence[Call]) -> float:
    """Microseconds that the calls take together on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def summary(times: Sequence[float]) -> Timing:
    """Median and interquartile range of microseconds."""
    if len(times) == 1:
        return Timing(times[0], 0.0, 1, times[0])
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(middle, high - low, len(times), min(times))


def machine(device: str) -> dict[str, str | int]:
    """What figures depend on: device, versions, clocks as far as the system tells."""
    facts: dict[str, str | int] = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        import triton

        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpus"] = torch.cuda.device_count()
        facts["triton"] = triton.__version__
        facts["cuda"] = str(torch.version.cuda)
        facts["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory
        facts |= _nvidia_smi()
    return facts


def _nvidia_smi() -> dict[str, str | int]:
    """Driver and clocks; nothing where the tool is missing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    index = torch.cuda.current_device()
    try:
        done = subprocess.run(
            [program, f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=False))


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
