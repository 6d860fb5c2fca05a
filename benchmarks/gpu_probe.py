"""Time the probe and the clustering of heads on a GPU: 32 layers of LLaMA-7B's heads.

What an online membership costs a prefill: from queries and keys of the first W tokens to the
tables that attention needs, called from Python as the runtime does, and in a CUDA graph: the
time on the GPU, which is all that counts while a prefill keeps it busy. Beside it, the same in
plain PyTorch. Memberships of both must agree before anything is timed.

    python benchmarks/gpu_probe.py --out gpu_probe.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from chai_attention.clustering.kmeans import TIE, kmeans
from chai_attention.membership import Membership
from chai_attention.ops import window_gram
from chai_attention.ops.online import fused_membership
from chai_attention.ops.triton.chunks import chunks_of

LAYERS, HEADS, DIM = 32, 32, 128
DECODE_MEMBERS, PREFILL_MEMBERS = 8, 2  # the tables that both phases need


def fused(query: Tensor, key: Tensor, clusters: int) -> Membership:
    """Membership and tables by the kernels."""
    member = fused_membership(query, key, clusters, tie=TIE, scale=DIM**-0.5, softcap=None)
    assert member is not None
    tables(member)
    return member


def plain(query: Tensor, key: Tensor, clusters: int) -> Membership:
    """The same in PyTorch."""
    gram = window_gram(query, key, scale=DIM**-0.5)
    member = Membership.from_representatives(kmeans(gram, clusters), clusters)
    tables(member)
    return member


def tables(member: Membership) -> None:
    """Make what prefill and decode read."""
    for members in (DECODE_MEMBERS, PREFILL_MEMBERS):
        chunks_of(member, members)
    assert member.key_heads is not None
    assert member.value_heads is not None


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


def main() -> None:
    """Check, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the prompts")
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = (options.batch, options.tokens, HEADS, DIM)
    layers = []
    for _ in range(LAYERS):
        states = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "qk"]
        # heads that resemble each other, as in a model
        states[0] += 2 * states[0][:, :, torch.randint(6, (HEADS,), device="cuda")]
        states[1] += 2 * states[1][:, :, torch.randint(6, (HEADS,), device="cuda")]
        layers.append([x.transpose(1, 2)[:, :, : options.window] for x in states])
    rows = []
    for clusters in (4, 8, 16):
        differ = 0
        for query, key in layers[:4]:
            a, b = fused(query, key, clusters), plain(query, key, clusters)
            differ += int((a.representatives != b.representatives).any(1).sum())
        if differ:
            raise SystemExit(f"{differ} memberships differ from PyTorch's; nothing is reported")

        def all_layers(make: Callable[..., Membership], k: int = clusters) -> None:
            for query, key in layers:
                make(query, key, k)

        rows.append(
            {
                "clusters": clusters,
                "fused_ms": milliseconds(lambda: all_layers(fused), 10),
                "fused_graph_ms": graph_milliseconds(lambda: all_layers(fused)),
                "pytorch_ms": milliseconds(lambda: all_layers(plain), 2),
            }
        )
        print(rows[-1])
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
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
