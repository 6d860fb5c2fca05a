"""Random cases of all attention kernels against the float64 definition, in parallel processes.

Compiling takes longer than running; each process compiles other configurations than the rest.

    python benchmarks/gpu_random.py --cases 1000
    python benchmarks/gpu_random.py --cases 1000 --streaming
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/ops/triton/test_random_cases.py"


def run(part: str, options: argparse.Namespace) -> tuple[int, str]:
    """Run one part, ``3/12``: its exit code, and its last line or, where it failed, its output."""
    environment = {
        **os.environ,
        "CHAI_RANDOM_CASES": str(options.cases),
        "CHAI_RANDOM_SHARD": part,
        "CHAI_RANDOM_STREAMING": str(int(options.streaming)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", TESTS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    last = done.stdout.strip().rpartition("\n")[2] or "no output"
    return done.returncode, done.stdout if done.returncode else last


def main() -> None:
    """Run all parts, print each one's last line, fail if one did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--streaming", action="store_true", help="exact windows, streaming heads")
    options = parser.parse_args()
    start, failed = time.perf_counter(), False
    parts = [f"{part}/{options.processes}" for part in range(options.processes)]
    with ThreadPoolExecutor(options.processes) as pool:
        for part, (code, text) in enumerate(pool.map(partial(run, options=options), parts)):
            print(f"part {part}: {text}", flush=True)
            failed |= code != 0
    print(f"{options.cases} cases, {time.perf_counter() - start:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
