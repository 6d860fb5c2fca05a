"""Time the probe and the clustering of heads on a GPU: 32 layers of LLaMA-7B's heads.

What an online membership costs a prefill: from queries, keys and values of the first W tokens to
the tables that attention needs, called from Python as the runtime does, and in a CUDA graph: the
time on the GPU, which is all that counts while a prefill keeps it busy. Beside it, the same in
plain PyTorch. Memberships of both must agree before anything is timed.

    python benchmarks/gpu_probe.py --out gpu_probe.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from torch import Tensor

from chai_attention.errors import ChaiError
from chai_attention.membership import Membership
from chai_attention.ops import online
from chai_attention.ops.triton import launch_decode, launch_prefill
from chai_attention.ops.triton.device import capability
from chai_attention.ops.triton.head_tiles import head_tiles_of, heads_per_tile
from chai_attention.results import write_result
from chai_attention.runtime.plan import LayerPlan

LAYERS, HEADS, DIM = 32, 32, 128
CLUSTERS = (4, 8, 16)
# what is compared in the window, and whether static costs are added
METHODS = {
    "k-means of maps": ("scores", False),
    "blend with distances of maps": ("scores", True),
    "blend with distances of outputs": ("value", True),
}
CHECKED_LAYERS = 4

Layer = tuple[Tensor, Tensor, Tensor]


def plan_of(method: str, clusters: int, window: int) -> LayerPlan:
    """A layer with an online membership."""
    features, blended = METHODS[method]
    costs = torch.rand(HEADS, HEADS, generator=torch.Generator().manual_seed(0))
    return LayerPlan(
        0, HEADS, HEADS, clusters, window, "scores", features=features, blend=float(blended),
        costs=tuple(tuple(row) for row in costs.tolist()) if blended else None,
    )  # fmt: skip


def cluster(plan: LayerPlan, layer: Layer) -> Membership:
    """Membership of one layer, with the tables that prefill and decode read."""
    member = plan.online_membership(*layer, DIM**-0.5, None)
    for columns in (launch_decode.COLUMNS, launch_prefill.COLUMNS):
        head_tiles = head_tiles_of(member, heads_per_tile(HEADS, plan.clusters, columns // DIM))
    if capability(layer[0].device)[0] == 9:  # Hopper's prefill
        assert head_tiles.used is not None
    assert member.key_heads is not None
    assert member.value_heads is not None
    return member


@contextmanager
def pytorch_only() -> Iterator[None]:
    """Without the kernels."""
    kernels = online._kernels
    online._kernels = lambda *states: None
    try:
        yield
    finally:
        online._kernels = kernels


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time until the GPU is done."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def graph_milliseconds(call: Callable[[], object]) -> float:
    """Median time of a CUDA graph of the call: what a GPU that is never waited for takes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return milliseconds(graph.replay, 10)


def inputs(batch: int, tokens: int, window: int) -> list[Layer]:
    """Windows of longer prompts; heads resemble each other, as in a model."""
    layers = []
    for _ in range(LAYERS):
        states = []
        for _ in "qkv":
            x = torch.randn(batch, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
            x += 2 * x[:, :, torch.randint(6, (HEADS,), device="cuda")]
            states.append(x.transpose(1, 2)[:, :, :window])
        layers.append((states[0], states[1], states[2]))
    return layers


def measure(method: str, clusters: int, layers: list[Layer]) -> dict[str, object]:
    """Check one method against PyTorch, then time both."""
    plan = plan_of(method, clusters, layers[0][0].shape[2])

    def all_layers() -> None:
        for layer in layers:
            cluster(plan, layer)

    differ = 0
    for layer in layers[:CHECKED_LAYERS]:
        got = cluster(plan, layer).representatives
        with pytorch_only():
            differ += int((got != cluster(plan, layer).representatives).any(1).sum())
    if differ:
        raise SystemExit(f"{method}, {clusters} clusters: {differ} memberships differ; no figures")
    row: dict[str, object] = {
        "method": method,
        "clusters": clusters,
        "fused_ms": milliseconds(all_layers, 10),
        "fused_graph_ms": graph_milliseconds(all_layers),
    }
    with pytorch_only():
        row["pytorch_ms"] = milliseconds(all_layers, 2)
    return row


def main() -> None:
    """Check, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the prompts")
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = inputs(options.batch, options.tokens, options.window)
    rows = []
    for method in METHODS:
        for clusters in CLUSTERS:
            rows.append(measure(method, clusters, layers))
            print(rows[-1], flush=True)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "layers": LAYERS,
        "heads": HEADS,
        "batch": options.batch,
        "window": options.window,
        "results": rows,
    }
    if options.out:
        write_result(options.out, result, ChaiError)


if __name__ == "__main__":
    main()
