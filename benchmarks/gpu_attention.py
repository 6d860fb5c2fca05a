"""Time the Triton kernels of one LLaMA-7B layer on a GPU: JSON and a table.

Shape: 32 heads x 128, bfloat16. Baseline: the fastest of torch's scaled_dot_product_attention
backends (cuDNN, FlashAttention, memory-efficient) in the same run. "Ideal" is the share of work
left: bytes of K and V in decode, matrix work in prefill, (k + 32) / 64. All times are of CUDA
graphs, over inputs that do not fit the L2 cache together. A case is timed only
after its result agreed with the float64 definition on a part of its rows.

    python benchmarks/gpu_attention.py --out gpu_attention.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chai_attention.membership import Membership
from chai_attention.ops import attention, reference
from memberships import even_membership

HEADS, DIM, DTYPE = 32, 128, torch.bfloat16
L2_BYTES = 50 * 2**20
DECODE = [(16, 8192), (64, 4096), (1, 32768), (1, 2048)]
PREFILL = [(1, 2048), (1, 8192), (1, 32768), (8, 2048)]
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def graph_us(calls: list[Callable[[], object]]) -> float:
    """Median time of one call in microseconds, from replays of a CUDA graph of all calls.

    The calls work on different inputs, so many that together they do not fit the L2 cache; a
    graph leaves out the time Python takes to launch.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(15):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times[3:])


def fastest_sdpa(inputs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[str, float]:
    """Name and time of the fastest backend."""
    best = ("none", float("inf"))
    causal = inputs[0][0].shape[2] > 1
    calls = [partial(F.scaled_dot_product_attention, *qkv, is_causal=causal) for qkv in inputs]
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            try:
                best = min(best, (name, graph_us(calls)), key=lambda item: item[1])
            except RuntimeError:
                continue  # this backend does not take the shape
    return best


def check(got: Tensor, query: Tensor, key: Tensor, value: Tensor, member: Membership) -> None:
    """Stop if the last rows of the first and last sequence are not the definition's."""
    rows = min(query.shape[2], 4)
    for b in {0, query.shape[0] - 1}:
        part = (x[b : b + 1] for x in (query[:, :, -rows:], key, value))
        want, _ = reference.attention(
            *(x.double() for x in part), member.select(torch.tensor([b])), scale=DIM**-0.5
        )
        error = ((got[b : b + 1, -rows:].double() - want).norm() / want.norm()).item()
        if not error < 1e-2:
            raise SystemExit(f"wrong result: relative error {error:.2e}; nothing is reported")


def measure(kind: str, batch: int, size: int) -> list[dict[str, object]]:
    """All timings of one shape."""
    queries = 1 if kind == "decode" else size
    sets = max(1, 2 * L2_BYTES // (2 * 2 * batch * HEADS * size * DIM))
    inputs = []
    for _ in range(sets):
        query = torch.randn(batch, HEADS, queries, DIM, device="cuda", dtype=DTYPE)
        key, value = (
            torch.randn(batch, HEADS, size, DIM, device="cuda", dtype=DTYPE) for _ in "kv"
        )
        inputs.append((query, key, value))
    name, baseline = fastest_sdpa(inputs)
    # V as the cache keeps it: token-major
    inputs = [(q, k, v.transpose(1, 2).contiguous().transpose(1, 2)) for q, k, v in inputs]
    rows = []
    for clusters in (4, 16, 32):
        member = even_membership(HEADS, clusters, batch).to("cuda")
        calls = []
        for query, key, value in inputs:
            q, k = query[:, :clusters].contiguous(), key[:, :clusters].contiguous()
            calls.append(partial(attention, q, k, value, member, scale=DIM**-0.5))
        check(calls[-1]()[0], q, k, value, member)
        time = graph_us(calls)
        moved = batch * size * DIM * 2 * (clusters + HEADS)
        flops = 2 * batch * size * size * DIM * (clusters + HEADS) / 2
        rows.append(
            {
                "kind": kind,
                "batch": batch,
                "tokens": size,
                "clusters": clusters,
                "us": time,
                "baseline": name,
                "baseline_us": baseline,
                "speedup": baseline / time,
                "ideal": 2 * HEADS / (clusters + HEADS),
                "rate": moved / time / 1e6 if kind == "decode" else flops / time / 1e6,
            }
        )
    return rows


def ceilings() -> dict[str, float]:
    """What the card can do: copy bandwidth in TB/s, matrix products in TFLOP/s."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    graph_us([lambda: target.copy_(source)] * 20)
    copy = graph_us([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in "ab")
    product = graph_us([lambda: a @ b])
    return {
        "copy_tb_s": 2 * source.nbytes / copy / 1e6,
        "matmul_tflop_s": 2 * 8192**3 / product / 1e6,
    }


def main() -> None:
    """Measure every case, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **ceilings(),
    }
    print(machine)
    print(
        f"{'case':>22} {'k':>3} {'us':>9} {'baseline':>17} {'ratio':>6} {'ideal':>6} {'rate':>12}"
    )
    rows = []
    for kind, cases in (("decode", DECODE), ("prefill", PREFILL)):
        unit = "TB/s" if kind == "decode" else "TF/s"
        for batch, size in cases:
            for row in measure(kind, batch, size):
                rows.append(row)
                print(
                    f"{kind:>8} {batch:>4} x {size:>6} {row['clusters']:>3} {row['us']:9.1f} "
                    f"{row['baseline']:>7} {row['baseline_us']:9.1f} {row['speedup']:5.2f}x "
                    f"{row['ideal']:5.2f}x {row['rate']:7.2f} {unit}"
                )
            torch.cuda.empty_cache()
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
