"""Capacity before anything is loaded; no vLLM needed."""

import pytest
from transformers import LlamaConfig

from chai_attention.errors import ChaiError
from chai_attention.integrations.transformers.support import describe
from chai_attention.integrations.vllm.estimate import capacity, estimate
from chai_attention.integrations.vllm.layers import served_layers
from chai_attention.integrations.vllm.serving import option_value
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
    assert narrow.full.tokens == 2 * plain.full.tokens
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
    assert option_value(["--a", "1", "--b=2"], "--b") == "2"
    with pytest.raises(ChaiError, match="--max-model-len is a number, not 'long'"):
        estimate_config(LLAMA_7B, "llama-7b", ["--max-model-len", "longk"], 80 * GB)
    with pytest.raises(ChaiError, match="--max-num-seqs is a number"):
        estimate_config(LLAMA_7B, "llama-7b", ["--max-num-seqs", "many"], 80 * GB)


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
