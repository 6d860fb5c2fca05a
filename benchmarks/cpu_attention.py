"""Time clustered attention of one LLaMA-7B layer on the CPU: JSON and a table.

Shape: 32 heads x 128. Baselines, in the same run: torch's scaled_dot_product_attention and the
library's own blocked code without clusters (k = H); the ratio is taken against the faster one.
"Ideal" is the share of work left: matrix work (k + H) / 2H in prefill, bytes of K and V in decode.
A case is timed only after its result agreed with the float64 definition.

    python benchmarks/cpu_attention.py --out docs/results/cpu_attention.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import blocked, dispatch, reference
from memberships import even_membership

HEADS, DIM = 32, 128
CLUSTERS = (4, 16, 32)
CASES = [("prefill", n, n) for n in (512, 2048)] + [("decode", 1, n) for n in (2048, 8192, 16384)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def median_ms(run: Callable[[], object], budget: float) -> tuple[float, float]:
    """Median time of repeated runs, and their interquartile range, in milliseconds."""
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    low, mid, high = statistics.quantiles(times, n=4)
    return mid, high - low


def check(run: Callable[[], Tensor], inputs: tuple[Tensor, ...], member: Membership) -> None:
    """Stop if the result is not the definition's, on a slice small enough to compute."""
    q, k, v = (x[:1].double() for x in inputs)
    rows = min(q.shape[2], 16)
    one = member.select(torch.tensor([0]))
    want, _ = reference.attention(q[:, :, -rows:], k, v, one, scale=DIM**-0.5)
    got = run()[:1, -rows:].double()
    error = ((got - want).norm() / want.norm()).item()
    if not error < (1e-5 if inputs[0].dtype == torch.float32 else 1e-2):
        raise SystemExit(f"wrong result: relative error {error:.2e}; nothing is reported")


def run_op(op: ModuleType, inputs: tuple[Tensor, ...], member: Membership) -> Tensor:
    """One call of an implementation of attention."""
    return op.attention(*inputs, member, scale=DIM**-0.5)[0]


def measure(kind: str, queries: int, size: int, batch: int, dtype: torch.dtype, budget: float):
    """All timings of one shape."""
    query = torch.randn(batch, HEADS, queries, DIM, dtype=dtype)
    key = torch.randn(batch, HEADS, size, DIM, dtype=dtype)
    value = torch.randn(batch, HEADS, size, DIM, dtype=dtype)
    token_major = value.transpose(1, 2).contiguous().transpose(1, 2)
    sdpa, _ = median_ms(
        lambda: F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1), budget
    )
    rows = []
    for clusters in CLUSTERS:
        member = even_membership(HEADS, clusters, batch)
        # the cache keeps V token-major where heads are clustered
        values = value if clusters == HEADS else token_major
        inputs = (query[:, :clusters], key[:, :clusters].contiguous(), values)
        run = partial(run_op, dispatch, inputs, member)

        check(run, inputs, member)
        mid, spread = median_ms(run, budget)
        rows.append(
            {
                "kind": kind,
                "batch": batch,
                "tokens": size,
                "dtype": str(dtype).removeprefix("torch."),
                "clusters": clusters,
                "ms": mid,
                "iqr_ms": spread,
                "sdpa_ms": sdpa,
                "ideal": 2 * HEADS / (clusters + HEADS),
            }
        )
    inputs = (query, key, value)
    own, _ = median_ms(
        partial(run_op, blocked, inputs, even_membership(HEADS, HEADS, batch)), budget
    )
    for row in rows:
        row["own_all_heads_ms"] = own
        row["speedup"] = min(sdpa, own) / row["ms"]
    return rows


def main() -> None:
    """Measure every case, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each timing")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for dtype in options.dtype:
            for batch in options.batch:
                for kind, queries, size in CASES:
                    rows += measure(kind, queries, size, batch, DTYPES[dtype], options.seconds)
    machine = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }
    table = Table(title=f"{machine['processor']}, {machine['threads']} threads, 32 heads x 128")
    for name in ("case", "dtype", "k", "ms", "sdpa", "own k=32", "speed-up", "ideal"):
        table.add_column(name, justify="left" if name in ("case", "dtype") else "right")
    for row in rows:
        table.add_row(
            f"{row['kind']} {row['batch']} x {row['tokens']}",
            row["dtype"],
            str(row["clusters"]),
            f"{row['ms']:.2f} ±{row['iqr_ms']:.2f}",
            f"{row['sdpa_ms']:.2f}",
            f"{row['own_all_heads_ms']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['ideal']:.2f}x",
        )
    Console(width=110).print(table)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")


def _processor() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
