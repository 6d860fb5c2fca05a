"""Every kernel on a few tiny inputs, for NVIDIA's compute-sanitizer; results are checked, too.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py

Memory is not cached, so that the tool sees the bounds of every tensor.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
if "--interpret" in sys.argv:  # the same without a GPU, to check this script
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from chai_attention.clustering.assign import assign_by_cost
from chai_attention.clustering.kmeans import TIE, kmeans
from chai_attention.clustering.kmedoids import choices
from chai_attention.membership import Membership
from chai_attention.ops import cache_write, window_gram
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.probe import HeadClustering, window_output_distances
from chai_attention.ops.triton import online, write
from chai_attention.runtime.plan import relative
from helpers import random_membership
from kernel_calls import DEVICE, Config
from page_writes import launch_paged, write_paged
from random_cases import check_case

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # as the interpreter needs it
TOKENS = 40


def config(
    kind: str, heads: int, kv_heads: int, clusters: int, dim: int, **other: object
) -> Config:
    """A configuration with nothing special but what is said."""
    options: dict[str, object] = {
        "value_dim": dim, "dtype": HALF, "softcap": None, "padded": False, "spare": False,
        "page": 16, "recent": 0, "sinks": 0, "probe_end": 0, **other,
    }  # fmt: skip
    return Config(kind, heads, kv_heads, clusters, dim, **options)


ATTENTION = [
    (config("decode", 8, 8, 3, 64), TOKENS),
    (config("decode", 9, 3, 4, 48, padded=True, spare=True, softcap=5.0), TOKENS),
    (config("decode", 8, 8, 8, 128, dtype=torch.float32), 300),
    (config("prefill", 8, 8, 3, 64, softcap=5.0), TOKENS),
    (config("prefill", 9, 3, 4, 48, padded=True, spare=True), TOKENS),
    (config("prefill", 6, 6, 2, 128), 130),  # on Hopper, the kernel for it
    (config("prefill", 6, 6, 6, 64), 130),
    (config("local", 8, 8, 3, 64, recent=5, sinks=2, spare=True), TOKENS),
    (config("local", 9, 3, 2, 48, recent=32, sinks=4, spare=True, padded=True), TOKENS),
    (config("paged", 8, 8, 3, 64), TOKENS),
    (config("paged", 9, 3, 4, 80, softcap=5.0, page=32), TOKENS),
    (config("local", 8, 8, 3, 64, recent=5, sinks=2, streaming=3, spare=True), TOKENS),
    (config("paged local", 8, 8, 2, 64, recent=5, sinks=2), TOKENS),
    (config("paged local", 9, 3, 2, 48, recent=20, sinks=4, streaming=4, local_page=48), 130),
    (config("paged", 12, 12, 4, 128, page=64), 200),  # on Hopper, the kernel for it
    (
        config(
            "paged local", 9, 9, 2, 128, recent=20, sinks=4, streaming=3, local_page=48, page=64
        ),
        200,
    ),
    (config("paged prefill", 8, 8, 3, 64), TOKENS),
    (config("paged prefill", 9, 3, 4, 48, probe_end=5, page=32), TOKENS),
    (config("varlen", 8, 8, 3, 64, probe_end=5), TOKENS),
    (config("varlen", 6, 6, 2, 128), 130),
]


def writes_dense() -> None:
    """Cache write of fixed capacity, beyond the end too."""
    member = random_membership(9, 4, 2)
    new = [torch.randn(2, 9, 5, 48) for _ in "kv"]
    start = torch.tensor([0, 13])
    results = []
    for function, device in ((write.write_dense, DEVICE), (cache_write.write_dense, "cpu")):
        keys = torch.zeros(2, 4, 16, 48, device=device)
        values = torch.zeros(2, 9, 16, 48, device=device)
        key, value = (x.to(device) for x in new)
        function(key, value, keys, values, member.to(device), start.to(device))
        results.append([keys.cpu(), values.cpu()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def writes_paged() -> None:
    """Cache write into far and local pages, some tokens left out."""
    member = random_membership(9, 3, 1, streaming=4)
    key, value = (torch.randn(7, 9, 48) for _ in "kv")
    slots = torch.tensor([3, 40, -1, 17, 0, 31, 47])
    local_slots = torch.tensor([3, -1, 8, 17, 0, 31, 15])
    results = []
    for function, device in ((launch_paged, DEVICE), (write_paged, "cpu")):
        keys, values, local_keys, local_values = (
            torch.zeros(count, 16, heads, 48, device=device)
            for count, heads in ((3, 3), (3, 5), (2, 6), (2, 4))
        )
        local = LocalPages(local_keys, local_values, torch.zeros(1, 1, dtype=torch.int32), 4, 1)
        function(
            key.to(device), value.to(device), keys, values, slots.to(device), member.to(device),
            local=local, local_slot_mapping=local_slots.to(device),
        )  # fmt: skip
        results.append([x.cpu() for x in (keys, values, local_keys, local_values)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def online_membership(heads: int, clusters: int) -> None:
    """Probe, k-means and tables."""
    query, key = (2 * torch.randn(2, heads, 8, 32, device=DEVICE) for _ in "qk")
    how = HeadClustering(clusters, 0.3, None, TIE, by_means=True)
    got = online.membership_of_window(query, key, None, how)
    gram = window_gram(query.cpu(), key.cpu(), scale=0.3)
    want = Membership.from_representatives(kmeans(gram, clusters))
    assert torch.equal(got.representatives.cpu(), want.representatives)
    assert torch.equal(got.order.cpu(), want.order)


def online_medoids(heads: int, clusters: int) -> None:
    """Probe, distances of outputs, k-medoids on the blend and tables."""
    query, key, value = (2 * torch.randn(2, heads, 8, 32, device=DEVICE) for _ in "qkv")
    static = torch.rand(heads, heads, device=DEVICE)
    table = choices(heads, clusters)
    how = HeadClustering(clusters, 0.3, None, TIE, static=static, choices=table)
    got = online.membership_of_window(query, key, value, how)
    distances = window_output_distances(query.cpu(), key.cpu(), value.cpu(), scale=0.3)
    costs = relative(distances) + static.cpu()
    want = Membership.from_representatives(assign_by_cost(costs, clusters, heads))
    assert torch.equal(got.representatives.cpu(), want.representatives)
    assert torch.equal(got.order.cpu(), want.order)


OTHERS: list[tuple[str, Callable[[], None]]] = [
    ("cache write", writes_dense),
    ("cache write, paged", writes_paged),
    ("online membership, 9 heads", lambda: online_membership(9, 4)),
    ("online membership, 32 heads", lambda: online_membership(32, 5)),
    ("online membership, blend, 9 heads", lambda: online_medoids(9, 4)),
    ("online membership, blend, 32 heads", lambda: online_medoids(32, 5)),
]


def main() -> None:
    """Run all, one line each."""
    if DEVICE == "cpu" and "--interpret" not in sys.argv:
        sys.exit("needs a GPU, or --interpret")
    torch.manual_seed(0)
    for number, (each, most) in enumerate(ATTENTION):
        print(each, flush=True)
        check_case(each, number, most, full=True)
    for name, work in OTHERS:
        print(name, flush=True)
        work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{len(ATTENTION) + len(OTHERS)} cases are right")


if __name__ == "__main__":
    main()
