"""Views of local pages: each layer's part, and nobody keeps a cache that vLLM has given back."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.weak import WeakIdKeyDictionary

pytest.importorskip("vllm", reason="needs vLLM (make test-vllm)")

from chai_attention.integrations.vllm import warm_up
from chai_attention.integrations.vllm.impl import ChaiAttention
from chai_attention.integrations.vllm.kv_cache import LocalLayer
from chai_attention.integrations.vllm.layers import LayerShard, PageLayout
from chai_attention.runtime.plan import LayerPlan

LAYOUTS = {"a": PageLayout(3, 1, 8, 4), "b": PageLayout(0, 0, 8, 4), "c": PageLayout(2, 5, 8, 4)}
NUMBERS = sum(layout.numbers_per_token for layout in LAYOUTS.values())


def local_layer() -> LocalLayer:
    return LocalLayer(None, None, LAYOUTS, NUMBERS + 16, [40], lambda page: page, 4, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_share_pages_and_nothing_of_them_overlaps(dtype) -> None:
    local, tokens = local_layer(), 3
    # a page beside others in a wider block, as packed groups have it
    block = torch.zeros(5, 2000, dtype=dtype)
    local.kv_cache = block[:, 7 : 7 + tokens * (NUMBERS + 16)].unflatten(1, (1, tokens, -1))
    counted = 0
    for number, (name, layout) in enumerate(LAYOUTS.items(), 1):
        keys, values = local.split(name, dtype)
        assert keys.shape == (5, tokens, layout.key_heads, layout.head_dim)
        assert values.shape == (5, tokens, layout.value_heads, layout.value_dim)
        for part in (keys, values):
            assert (part == 0).all()  # nobody's yet
            part.fill_(number)
            counted += part.numel()
    assert (local.kv_cache != 0).sum() == counted
    assert (block != 0).sum() == counted


def test_eight_bit_pages_are_seen_as_floats() -> None:
    local = local_layer()
    local.kv_cache = torch.zeros(2, 1, 3, NUMBERS + 16, dtype=torch.uint8)
    keys, _ = local.split("c", torch.float8_e4m3fn)
    assert keys.dtype == torch.float8_e4m3fn
    assert keys.data_ptr() > local.kv_cache.data_ptr()


def clustered(blocks: int | None) -> tuple[ChaiAttention, LocalLayer]:
    """A layer whose vLLM plans so many pages, and that of its local pages."""
    rep = (0, 0, 2, 2, 4)
    plan = LayerPlan(0, 5, 5, 2, 8, "scores", rep, recent=4, sinks=1, streaming=(4,))
    impl = object.__new__(ChaiAttention)
    impl.layer = LayerShard(plan, 2, rep)
    impl.scale, impl.softcap, impl.is_fp8 = 0.3, None, False
    impl._name, impl._workspace, impl._held = "layer", None, None
    impl._kinds = impl._flash = None
    impl._viewed = WeakIdKeyDictionary()
    impl.layout, impl.local_layout = impl.layer.layout(8, 8), impl.layer.local_layout(8, 8)
    numbers = impl.local_layout.numbers_per_token
    local = LocalLayer(None, None, {"layer": impl.local_layout}, numbers, [1], int, 4, 1, 0)
    cache_config = SimpleNamespace(num_gpu_blocks=blocks)
    impl.model_state = SimpleNamespace(
        local=local, max_requests=3, config=SimpleNamespace(cache_config=cache_config)
    )
    return impl, local


def test_pages_are_viewed_once_for_a_planned_cache_and_anew_for_any_other() -> None:
    impl, local = clustered(4)
    far, near = impl.layout.numbers_per_token, impl.local_layout.numbers_per_token
    caches = [torch.full((4, 1, 16, far), float(n)) for n in range(2)]
    local_caches = [torch.full((4, 1, 16, near), float(n)) for n in range(2)]
    local.kv_cache = local_caches[0]
    impl.prepare(caches[0])
    held = impl._pages(caches[0])
    assert impl._pages(caches[0]) is held
    assert held.shared == {}
    for one in (0, 1):  # other far pages, then other local ones, then both by turns
        for other in (0, 1):
            local.kv_cache = local_caches[other]
            pages = impl._pages(caches[one])
            assert (pages is held) == (one == other == 0)
            assert [float(x.mean()) for x in pages[:4]] == [one, one, other, other]
            assert pages is held or pages.shared is None


@pytest.mark.parametrize(
    "planned", [None, 4]
)  # vLLM plans with the trial's pages meanwhile, or not
def test_a_cache_for_trials_gets_free(planned: int | None) -> None:
    """The engine ran out of memory: vLLM makes one to measure CUDA graphs by, then the real one."""
    impl, local = clustered(planned)
    numbers = impl.local_layout.numbers_per_token
    model = SimpleNamespace(model_config=SimpleNamespace(max_model_len=16))
    far_memory = np.zeros((4, 1, 16, impl.layer.layout(8, 8).numbers_per_token), np.float32)
    local_memory = np.zeros((4, 1, 16, numbers), np.float32)
    local.kv_cache = torch.from_numpy(local_memory)
    cache = torch.from_numpy(far_memory)
    impl.prepare(cache)
    step = next(warm_up.decodes(SimpleNamespace(local=local, config=model), cache, [2]))
    impl.num_heads, impl._scales = 5, (1.0, 1.0)
    query, key, value = torch.randn(3, 2, 5, 8)
    impl.forward(None, query, key, value, cache, step, torch.zeros(2, 5, 8))
    del cache
    known = weakref.ref(far_memory), weakref.ref(local_memory)
    local.kv_cache = torch.tensor([])
    del far_memory, local_memory
    gc.collect()
    assert [memory() for memory in known] == [None, None]
