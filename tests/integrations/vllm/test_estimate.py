"""Capacity before anything is loaded; no vLLM needed."""

import pytest
from transformers import LlamaConfig

from chai_attention.errors import ChaiError
from chai_attention.integrations.vllm.estimate import (
    Blocks,
    Capacity,
    EngineOptions,
    batch_defaults,
    blocks_of,
    estimate,
    estimate_config,
    parameters,
)
from chai_attention.integrations.vllm.shares import layer_shards
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe

LLAMA_7B = LlamaConfig(dtype="bfloat16")
GB = 10**9


def test_pages_are_the_planners() -> None:
    layers = layer_shards(describe(LLAMA_7B), ClusterProfile.published("llama-7b"))
    found = Capacity(blocks_of(layers, 128), 100, 8192)
    assert found.per.block_bytes == 16 * 2 * 128 * (18 * 64 + 14 * 36)
    assert found.per.local_page is None
    assert found.tokens(8192) == 16 * 100
    assert found.requests(160) == 9  # one block is nobody's


def test_published_schedule_holds_a_quarter_more() -> None:
    assert parameters(LLAMA_7B) == 6_738_415_616
    found = estimate_config(LLAMA_7B, "llama-7b", [], 80 * GB)
    assert found.capacity_gain(8192) == pytest.approx(1 / (1 - 0.1914), rel=2e-3)
    assert found.token_bytes[0] == 524_288
    # the more K and V against weights, the nearer to the share of bytes saved
    gains = [found.decode_gain(batch, 8192) for batch in (1, 16, 256)]
    assert gains == sorted(gains)
    assert gains[-1] < found.token_bytes[0] / found.token_bytes[1]


def test_options_of_vllm_are_heeded() -> None:
    plain = estimate_config(LLAMA_7B, "llama-7b", [], 80 * GB)
    less = estimate_config(LLAMA_7B, "llama-7b", ["--gpu-memory-utilization", "0.5"], 80 * GB)
    two = estimate_config(LLAMA_7B, "llama-7b", ["-tp=2", "--block-size", "32"], 80 * GB)
    tokens = [found.clustered.tokens(8192) for found in (less, plain, two)]
    assert tokens == sorted(tokens)
    # half of the heads, in pages of half as many tokens
    assert two.clustered.per.block_bytes * 4 == plain.clustered.per.block_bytes
    assert (two.clustered.per.page, plain.clustered.per.page) == (32, 64)
    assert (two.full.per.page, plain.full.per.page) == (32, 16)
    narrow = estimate_config(LLAMA_7B, "llama-7b", ["--kv-cache-dtype=fp8"], 80 * GB)
    assert narrow.clustered.per.block_bytes * 2 == plain.clustered.per.block_bytes
    # prompts are read in copies: of 4 + 32 heads, one layer at a time
    assert narrow.budget.copies == (8192 + 2048) * (4 + 32) * 128 * 2
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
    with pytest.raises(ChaiError, match="--max-model-len is a number, not 'longk'"):
        estimate_config(LLAMA_7B, "llama-7b", ["--max-model-len", "longk"], 80 * GB)
    with pytest.raises(ChaiError, match="--max-num-seqs is a number"):
        estimate_config(LLAMA_7B, "llama-7b", ["--max-num-seqs", "many"], 80 * GB)


def test_memory_that_is_given_to_the_cache_is_all_it_gets() -> None:
    # with tables of memberships beside it, as vLLM counts what is given for pages alone
    words = ["--kv-cache-memory-bytes", "20G", "--gpu-memory-utilization", "0.95"]
    found = estimate_config(LLAMA_7B, "llama-7b", words, 80 * GB)
    assert found.budget.cache == 20 * 2**30
    for held in (found.full, found.clustered):
        assert held.blocks == 20 * 2**30 // held.per.block_bytes
    fixed = estimate_config(LLAMA_7B, "llama-7b", ["--num-gpu-blocks-override=700"], 80 * GB)
    assert fixed.full.blocks == fixed.clustered.blocks == 700
    assert fixed.budget.cache == 700 * fixed.clustered.per.block_bytes


def test_pages_that_no_kernel_takes_are_not_estimated() -> None:
    with pytest.raises(ChaiError, match="--block-size takes multiples of 16"):
        estimate_config(LLAMA_7B, "llama-7b", ["--block-size", "24"], 80 * GB)


def test_layers_on_several_gpus_are_not_counted_on_one() -> None:
    with pytest.raises(ChaiError, match="leave out --pipeline-parallel-size"):
        estimate_config(LLAMA_7B, "llama-7b", ["-pp", "2"], 80 * GB)


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


def windowed(recent: int, own: int = 8, streaming: int = 12) -> ClusterProfile:
    """8 heads that keep, 12 that share, 12 that stream in every layer, or other numbers."""
    far = 32 - streaming
    rep = tuple(head % own if head < far else head for head in range(32))
    return ClusterProfile(
        (own,) * 32, "static", representatives=(rep,) * 32,
        streaming=(tuple(range(far, 32)),) * 32, recent=recent, sinks=4,
    )  # fmt: skip


def test_local_pages_are_taken_from_the_same_blocks() -> None:
    layers = layer_shards(describe(LLAMA_7B), windowed(128))
    found = blocks_of(layers, 128, page=64)
    assert found.far_bytes == 64 * 32 * (8 + 20) * 128 * 2
    assert (found.local_page, found.local_bytes) == (48, 48 * 32 * (24 + 12) * 128 * 2)
    assert found.block_bytes == found.far_bytes
    assert found.wasted == pytest.approx(1 - 48 * 36 / (64 * 28))
    # 128 tokens lie in 4 pages of 48 at most, and the sinks in one more
    assert found.local_pages(10_000) == 5
    assert found.local_pages(100) == 3
    assert found.of_request(8192) == 128 + 5
    # a prompt of 8,192 that is read in one step has them all
    assert found.of_request(8192, 8192) == 128 + 171
    held = Capacity(found, 1 + 128 + 171 + 3 * 133, 8192)
    assert held.requests(8192) == 4
    assert Capacity(found, 128 + 171, 8192).requests(8192) == 0
    assert held.tokens(8192) == held.blocks * 8192 // 133


def test_a_local_page_may_be_the_larger_one() -> None:
    found = blocks_of(layer_shards(describe(LLAMA_7B), windowed(128)), 128, page=16)
    assert found.local_page == 16
    assert found.block_bytes == found.local_bytes == 16 * 32 * 36 * 128 * 2
    assert found.wasted == pytest.approx(1 - 28 / 36)


@pytest.mark.parametrize(("context", "gain"), [(2048, 2.0), (8192, 2.2), (32768, 2.26)])
def test_capacity_of_the_default_recipe_grows_with_the_context(context: int, gain: float) -> None:
    options = {"weight_bytes": 13 * GB, "vocabulary": 32000}
    found = estimate(describe(LLAMA_7B), windowed(128), EngineOptions(80 * GB), **options)
    assert found.capacity_gain(context) == pytest.approx(gain, abs=0.05)
    assert found.token_bytes == (524_288, 524_288 * 28 // 64)
    assert found.window_bytes == 132 * 524_288 * 36 // 64
    # nothing is taken for requests that do not run
    # prompts read copies of 8-bit pages, of local ones those of a step and of 16 windows
    narrow = EngineOptions(80 * GB, cache_element_size=1)
    far, local = 32768 * 28 * 128, (171 + 16 * (5 + 1)) * 48 * 36 * 128
    copies = estimate(describe(LLAMA_7B), windowed(128), narrow, **options).budget.copies
    assert copies == (far + local) * 2
    crowd = EngineOptions(80 * GB, requests=1024)
    more = estimate(describe(LLAMA_7B), windowed(128), crowd, **options)
    fewer = found.clustered.blocks - more.clustered.blocks
    assert fewer * found.clustered.per.block_bytes == pytest.approx(768 * 32000 * 8, abs=2e7)


def test_tables_of_online_memberships_share_the_memory_with_their_blocks() -> None:
    found = estimate_config(LLAMA_7B, "llama-7b", [], 80 * GB)
    row = found.budget.tables // found.clustered.blocks
    assert 14 * 1000 < row < 14 * 5000  # of 14 layers
    assert found.budget.cache // found.clustered.per.block_bytes == found.clustered.blocks


def test_ranks_lose_what_has_to_be_of_one_size() -> None:
    options = {"weight_bytes": 13 * GB, "vocabulary": 32000}
    shape = describe(LLAMA_7B)
    # of 8 heads two keep, three follow the layer's first head and three stream
    rep = tuple(0 if head % 8 in (2, 3, 4) else head for head in range(32))
    streaming = tuple(head for head in range(32) if head % 8 > 4)
    profile = ClusterProfile(
        (8,) * 32, "static", representatives=(rep,) * 32, streaming=(streaming,) * 32,
        recent=128, sinks=4,
    )  # fmt: skip
    one, two, eight = (
        estimate(shape, profile, EngineOptions(80 * GB, ranks=ranks), **options)
        for ranks in (1, 2, 8)
    )
    assert one.savings.lost == 0
    assert 0 < two.savings.lost < eight.savings.lost <= 1
    # the second rank has 4 of the 8, and one more that its followers follow
    assert two.token_bytes[1] == 32 * (5 + 10) * 128 * 2
    assert two.savings.one_rank * 128 * 2 == one.token_bytes[1]
    assert two.savings.share_on_one == one.savings.share == pytest.approx(1 - 28 / 64)
    assert "chai calibrate --tensor-parallel 2 chooses heads" in two.savings.line
    even = tuple(head // 2 * 2 for head in range(32))
    alike = ClusterProfile((16,) * 32, "static", representatives=(even,) * 32)
    four = estimate(shape, alike, EngineOptions(80 * GB, ranks=4), **options).savings
    assert four.lost == 0
    assert four.line == "25.0% of the K,V bytes per token saved on each of 4 ranks, as on one GPU"


def test_requests_without_local_pages() -> None:
    found = Blocks(64, None, 1000, 0)
    assert (found.local_pages(5000), found.wasted, found.block_bytes) == (0, 0.0, 1000)


def test_too_little_memory() -> None:
    with pytest.raises(ChaiError, match="no room for K and V"):
        estimate_config(LLAMA_7B, "llama-7b", [], 12 * GB)
