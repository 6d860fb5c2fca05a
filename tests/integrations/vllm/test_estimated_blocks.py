"""What `--estimate` counts, against what vLLM's planner makes of the same memory."""

import pytest
from transformers import AutoConfig

from chai_attention.integrations.vllm.estimate import Capacity, blocks_of
from chai_attention.integrations.vllm.shares import layer_shards
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from vllm_job import generate

PAGE, MEMORY = 32, 2**30
EVERY = list(range(8))
PROFILES = {
    "no window": ClusterProfile((3, 8, 5), window=8),
    "window": ClusterProfile((3, 8, 5), window=8, recent=40, sinks=3),
    "streaming": ClusterProfile(
        (2, 8, 5), "static",
        representatives=[[0, 0, 2, 3, 4, 4, 6, 7], EVERY, EVERY],
        streaming=[[2, 3, 6, 7], [], [1, 2, 6]], recent=70, sinks=4,
    ),
    "all stream": ClusterProfile(
        (0, 3, 4), "static",
        representatives=[EVERY, [0, 1, 2, 0, 1, 2, 6, 7], EVERY],
        streaming=[EVERY, [6, 7], [0, 2, 4, 6]], recent=20,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("no window", {}),
        ("window", {}),
        ("streaming", {}),
        ("streaming", {"kv_cache_dtype": "fp8"}),
        ("streaming", {"tensor_parallel_size": 2}),
        ("all stream", {}),
    ],
    ids=str,
)
def test_the_planner_makes_the_blocks_of_the_estimate(kind, options, engine, tiny) -> None:
    shape = describe(AutoConfig.from_pretrained(tiny))
    ranks = options.get("tensor_parallel_size", 1)
    element = 1 if "kv_cache_dtype" in options else 4
    per = blocks_of(layer_shards(shape, PROFILES[kind], ranks), 64, element, PAGE)
    assert (per.local_page is None) == (kind == "no window")
    found = engine(tiny, [generate([EVERY], 2)], PROFILES[kind], block_size=PAGE, **options)
    assert found["blocks"] == MEMORY // per.block_bytes


@pytest.mark.parametrize("kind", ["window", "streaming", "all stream"])
def test_so_many_requests_run_without_preemption(kind, engine, tiny) -> None:
    shape = describe(AutoConfig.from_pretrained(tiny))
    per = blocks_of(layer_shards(shape, PROFILES[kind]), 64, 4, PAGE)
    context, chunk, count = 200, 64, 4
    blocks = next(n for n in range(999) if Capacity(per, n, chunk).requests(context) == count)
    prompts = [[3 + seed + n % 50 for n in range(180)] for seed in range(count)]
    found = engine(
        tiny, [generate(prompts, 20)], PROFILES[kind], block_size=PAGE, max_model_len=256,
        max_num_batched_tokens=chunk, num_gpu_blocks_override=blocks, max_num_seqs=count,
    )  # fmt: skip
    assert found["preemptions"] == 0
    assert all(len(ids[0]) == 20 for ids in found["parts"][0]["ids"])
    assert found["free"] == [blocks - 1, blocks - 1]
