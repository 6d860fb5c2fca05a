"""What layers without clusters run, and which layouts of the cache all layers agree on."""

import pytest

pytest.importorskip("vllm")

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from chai_attention.integrations.vllm.backend import (
    ChaiBackend,
    backend_of,
    common_layouts,
    limited_to,
)
from chai_attention.integrations.vllm.layers import PageLayout

TOKENS_FIRST, HEADS_FIRST = KVCacheLayout.LBNHC, KVCacheLayout.LBHNC


class HeadsFirst(AttentionBackend):
    """Reads one layout only, as vLLM's attention for CPUs."""

    @classmethod
    def supported_kv_cache_layouts(cls):
        return (HEADS_FIRST,)


class Any(AttentionBackend):
    """Names no layout, as FlashAttention."""


@pytest.mark.parametrize(
    ("stock", "layouts"),
    [
        (None, (TOKENS_FIRST, HEADS_FIRST)),
        (Any, (TOKENS_FIRST, HEADS_FIRST)),
        (HeadsFirst, (HEADS_FIRST,)),
    ],
)
def test_ranks_with_and_without_clusters_name_the_same_layouts(stock, layouts):
    assert common_layouts(ChaiBackend.layouts, stock) == layouts
    ours = backend_of(PageLayout(3, 8, 64, 64), layouts)
    assert ours.supported_kv_cache_layouts() == layouts
    if stock is not None:
        limited = limited_to(stock, layouts)
        assert limited.supported_kv_cache_layouts() == layouts
        assert issubclass(limited, stock)
        assert (limited is stock) == (stock is HeadsFirst)
