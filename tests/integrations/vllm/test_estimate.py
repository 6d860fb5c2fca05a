"""Capacity before anything is loaded; no vLLM needed."""

import pytest
from transformers import LlamaConfig

from chai_attention.errors import ChaiError
from chai_attention.integrations.transformers.support import describe
from chai_attention.integrations.vllm.estimate import (
    batch_defaults,
    capacity,
    estimate,
    near_bytes,
    refuse_windows,
)
from chai_attention.integrations.vllm.layers import served_layers
from chai_attention.integrations.vllm.weigh import estimate_config, parameters
from chai_attention.profile import ClusterProfile

LLAMA_7B = LlamaConfig(dtype="bfloat16")
GB = 10**9


def test_pages_are_the_planners() -> None:
    layers = served_layers(describe(LLAMA_7B), ClusterProfile.published("llama-7b"))
    found = capacity(layers, 128, 50 * GB)
    page = 16 * 2 * 128 * (18 * 64 + 14 * 36)
    assert found.block_bytes == page
    assert found.blocks == 50 * GB // page
    assert found.tokens == 16 * found.blocks


def test_published_schedule_holds_a_quarter_more() -> None:
    assert parameters(LLAMA_7B) == 6_738_415_616
    found = estimate_config(LLAMA_7B, "llama-7b", [], 80 * GB)
    assert found.capacity_gain == pytest.approx(1 / (1 - 0.1914), rel=2e-3)
    assert found.token_bytes[0] == 524_288
    # the more K and V against weights, the nearer to the share of bytes saved
    gains = [found.decode_gain(batch, 8192) for batch in (1, 16, 256)]
    assert gains == sorted(gains)
    assert gains[-1] < found.token_bytes[0] / found.token_bytes[1]


def test_options_of_vllm_are_heeded() -> None:
    plain = estimate_config(LLAMA_7B, "llama-7b", [], 80 * GB)
    less = estimate_config(LLAMA_7B, "llama-7b", ["--gpu-memory-utilization", "0.5"], 80 * GB)
    two = estimate_config(LLAMA_7B, "llama-7b", ["-tp=2", "--block-size", "32"], 80 * GB)
    assert less.clustered.tokens < plain.clustered.tokens < two.clustered.tokens
    assert two.clustered.block_bytes == plain.clustered.block_bytes
    narrow = estimate_config(LLAMA_7B, "llama-7b", ["--kv-cache-dtype=fp8"], 80 * GB)
    assert narrow.clustered.block_bytes * 2 == plain.clustered.block_bytes
    # prompts are read in copies: of 4 + 32 heads, one layer at a time
    assert plain.budget.cache - narrow.budget.cache == (8192 + 2048) * (4 + 32) * 128 * 2
    assert narrow.full.blocks // 2 == plain.full.blocks  # twice as many, but for half a page
    for written, tokens in (("1k", 1000), ("1.5K", 1536), ("auto", 2048), ("-1", 2048)):
        options = [
            "--kv-cache-dtype",
            "fp8",
            "--max-num-batched-tokens=4K",
            "--max-model-len",
            written,
        ]
        found = estimate_config(LLAMA_7B, "llama-7b", options, 80 * GB)
        assert found.budget.copies == (4096 + tokens) * (4 + 32) * 128 * 2
    with pytest.raises(ChaiError, match="--max-model-len is a number, not 'long'"):
        estimate_config(LLAMA_7B, "llama-7b", ["--max-model-len", "longk"], 80 * GB)
    with pytest.raises(ChaiError, match="--max-num-seqs is a number"):
        estimate_config(LLAMA_7B, "llama-7b", ["--max-num-seqs", "many"], 80 * GB)


def test_requests_are_as_many_as_vllm_lets_run() -> None:
    # an H100 of 80 GB, and a GPU of 48 GB; what is given counts, also in vLLM's other spellings
    assert batch_defaults(80 * GB) == (1024, 8192)
    assert batch_defaults(192 * GB) == (1024, 16384)
    assert batch_defaults(48 * GB) == (256, 2048)
    for options, requests in (
        ([], 1024),
        (["--max_num_seqs", "64"], 64),
        (["--max-num-seqs=64"], 64),
        (["--max-num-seqs", "32", "--max-num-seqs", "64"], 64),
        (["--max-num-batched-tokens", "512"], 512),
        (["--performance-mode", "throughput"], 2048),
    ):
        assert estimate_config(LLAMA_7B, "llama-7b", options, 80 * GB).requests == requests


def test_windows_of_vllms_default_of_requests_are_counted(tmp_path) -> None:
    clusters = (32,) * 18 + (4,) * 14
    rep = [[head % k for head in range(32)] for k in clusters]
    file = tmp_path / "profile.json"
    ClusterProfile(clusters, "static", representatives=rep, recent=32, sinks=4).save(file)
    found = estimate_config(LLAMA_7B, str(file), [], 80 * GB)
    assert found.window_bytes == 14 * 28 * 36 * 128 * 2
    assert found.budget.windows == 1024 * found.window_bytes
    assert found.capacity_gain == pytest.approx(1.16, abs=0.01)


def test_windows_that_no_memory_holds_are_refused_before_they_are_taken() -> None:
    rep = [[head % 8 for head in range(32)]] * 32
    profile = ClusterProfile((8,) * 32, "static", representatives=rep, recent=32, sinks=4)
    each = near_bytes(served_layers(describe(LLAMA_7B), profile), 128, 2)
    refuse_windows(256, each, 80 * GB)
    with pytest.raises(ChaiError, match=r"4,000,000 requests take .* GB .*lower --max-num-seqs"):
        refuse_windows(4_000_000, each, 80 * GB)
    assert near_bytes(served_layers(describe(LLAMA_7B), profile), 128, 2, drafts=3) > each


def test_windows_are_taken_from_the_cache() -> None:
    shape = describe(LLAMA_7B)
    clusters = (8,) * 32
    rep = tuple(tuple(head % 8 for head in range(32)) for _ in clusters)
    plain = ClusterProfile(clusters, "static", representatives=rep)
    window = ClusterProfile(clusters, "static", representatives=rep, recent=32, sinks=4)
    options = {"gpu_bytes": 80 * GB, "weight_bytes": 13 * GB, "vocabulary": 32000}
    without, with_ = (estimate(shape, kind, **options) for kind in (plain, window))
    assert with_.window_bytes == 32 * 24 * 36 * 128 * 2
    assert without.budget.cache - with_.budget.cache == with_.window_bytes * 256
    assert with_.full == without.full


def test_too_little_memory() -> None:
    with pytest.raises(ChaiError, match="no room for K and V"):
        estimate_config(LLAMA_7B, "llama-7b", [], 12 * GB)
