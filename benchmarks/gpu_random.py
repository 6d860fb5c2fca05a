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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/ops/triton/test_random_cases.py"


def main() -> None:
    """Run all parts, print each one's last line, fail if one did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--streaming", action="store_true", help="exact windows, streaming heads")
    options = parser.parse_args()
    start = time.perf_counter()
    running = []
    for part in range(options.processes):
        environment = {
            **os.environ,
            "CHAI_RANDOM_CASES": str(options.cases),
            "CHAI_RANDOM_SHARD": f"{part}/{options.processes}",
            "CHAI_RANDOM_STREAMING": str(int(options.streaming)),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        running.append(
            subprocess.Popen(
                [*command, TESTS],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    failed = False
    for part, process in enumerate(running):
        text, _ = process.communicate()
        lines = text.strip().splitlines() or ["no output"]
        print(f"part {part}: {lines[-1] if process.returncode == 0 else text}", flush=True)
        failed |= process.returncode != 0
    print(f"{options.cases} cases, {time.perf_counter() - start:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
