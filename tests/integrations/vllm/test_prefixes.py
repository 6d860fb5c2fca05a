"""Which requests' pages later ones may find, by vLLM's own manager of pages."""

import pickle

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.vllm.backend import ChaiBackend, backend_of, with_far_pages
from chai_attention.integrations.vllm.kv_cache import FarManager, FarSpec, far_pages
from chai_attention.integrations.vllm.layers import PageLayout

PAGE, PROBE = 16, 10
PLAIN = FullAttentionSpec(
    block_size=PAGE, num_kv_heads=8, head_size=64, dtype=torch.float32
)  # fmt: skip


@pytest.fixture
def manager() -> KVCacheManager:
    group = KVCacheGroupSpec(["layer"], far_pages(PLAIN, PROBE))
    config = KVCacheConfig(num_blocks=40, kv_cache_tensors=[], kv_cache_groups=[group])
    made = KVCacheManager(config, 256, PAGE, PAGE, enable_caching=True)
    assert isinstance(made.coordinator.single_type_managers[0], FarManager)
    return made


def request(name: str, prompt: int) -> Request:
    init_none_hash(hash)
    return Request(
        name, list(range(prompt)), SamplingParams(max_tokens=100), None,
        block_hasher=get_request_block_hasher(PAGE, pickle.dumps),
    )  # fmt: skip


def run(manager: KVCacheManager, name: str, prompt: int, chunks: list[int]) -> None:
    """A request finds what it can, computes these chunks, generates as it needs to, and ends."""
    new = request(name, prompt)
    blocks, hits = manager.get_computed_blocks(new)[:2]
    for chunk in chunks:
        if new.num_computed_tokens >= new.num_tokens:
            new.append_output_token_ids(list(range(new.num_tokens, new.num_tokens + chunk)))
        assert manager.allocate_slots(new, chunk, hits, blocks) is not None
        new.num_computed_tokens += chunk + hits
        blocks, hits = None, 0
    manager.free(new)


def found(manager: KVCacheManager, tokens: int) -> int:
    """Tokens of a prompt that are found."""
    count: int = manager.get_computed_blocks(request("asks", tokens))[1]
    return count


def test_a_prompt_in_one_chunk_is_found_again(manager) -> None:
    run(manager, "a", 40, [40])
    assert found(manager, 41) == 2 * PAGE


def test_a_short_first_chunk_keeps_the_whole_request_out_of_the_cache(manager) -> None:
    run(manager, "a", 60, [PROBE - 1, 40, 11, 20])
    assert found(manager, 61) == 0
    run(manager, "b", 60, [PROBE, 50, 20])  # another that decided on enough
    assert found(manager, 61) == 3 * PAGE
    run(manager, "a", 77, [29])  # by the name of the first, which is forgotten
    assert found(manager, 78) == 4 * PAGE


def test_a_short_prompt_never_decides_what_a_longer_one_finds(manager) -> None:
    run(manager, "a", PROBE - 1, [PROBE - 1, 1, 30])
    assert found(manager, 41) == 0
    run(manager, "b", PROBE, [PROBE, 1, 30])
    assert found(manager, 41) == 2 * PAGE


def test_found_pages_and_what_follows_them_are_found_again(manager) -> None:
    run(manager, "a", 40, [40])
    run(manager, "b", 60, [4, 24])  # 32 tokens are found, the first chunk behind them is short
    assert found(manager, 61) == 3 * PAGE


def test_a_probe_that_ends_behind_the_first_page_is_refused() -> None:
    assert far_pages(PLAIN, PAGE).probe_end == PAGE
    with pytest.raises(UnsupportedModelError, match="--block-size 32 or more") as raised:
        far_pages(PLAIN, PAGE + 1)
    assert "--no-enable-prefix-caching" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_layers_of_a_model_go_to_one_manager() -> None:
    clustered = backend_of(PageLayout(3, 8, 64, 64), ChaiBackend.layouts, PROBE)
    specs = {
        "plain": with_far_pages(ChaiBackend, PROBE).customize_spec(PLAIN),
        "clustered": clustered.customize_spec(PLAIN),
    }
    assert all(type(spec) is FarSpec for spec in specs.values())
    assert specs["clustered"].page_size_bytes == PAGE * 64 * (3 + 8) * 4
    assert UniformTypeKVCacheSpecs.from_specs(specs) is not None
    same = [clustered.customize_spec(PLAIN)] * 2
    assert FarSpec.merge(same) == same[0]
    assert pickle.loads(pickle.dumps(same[0])) == same[0]  # ranks send it to the engine
