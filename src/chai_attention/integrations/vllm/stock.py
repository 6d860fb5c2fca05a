"""Layers without clusters run vLLM's own attention, which is faster than ours on full pages."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheLayout


def stock_backend(config: Any, layer: Any, dtype: torch.dtype) -> type[Any] | None:
    """The backend that vLLM itself has for a plain layer; None if none fits beside ours.

    Args:
        config: the ``VllmConfig``.
        layer: vLLM's ``Attention``.
        dtype: of K and V.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    cache = config.cache_config
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        chosen: type[Any] = CPUAttentionBackend
        fits = (
            chosen.supports_head_size(layer.head_size)
            and chosen.supports_dtype(dtype)
            and chosen.supports_block_size(cache.block_size)
        )
        return chosen if fits else None
    chosen = AttentionBackendEnum.FLASH_ATTN.get_class()
    problems = chosen.validate_configuration(
        head_size=layer.head_size,
        dtype=dtype,
        kv_cache_dtype=layer.kv_cache_dtype,
        block_size=cache.block_size if cache.user_specified_block_size else None,
        use_mla=False,
        has_sink=False,
        use_sparse=False,
        use_mm_prefix=False,
        use_per_head_quant_scales=False,
        device_capability=current_platform.get_device_capability(),
        attn_type=layer.attn_type,
    )
    return None if problems else chosen


def common_layouts(
    own: tuple[KVCacheLayout, ...], stock: type[Any] | None
) -> tuple[KVCacheLayout, ...]:
    """Layouts of the cache that all layers of a model can read, ours and vLLM's.

    With pipeline parallelism every rank has to name the same ones, whichever layers it has.

    Args:
        own: those of clustered layers, the preferred one first.
        stock: what runs the layers without clusters; None if the model has none.
    """
    read = None if stock is None else stock.supported_kv_cache_layouts()
    return own if read is None else tuple(layout for layout in own if layout in read)


def limited_to(stock: type[Any], layouts: tuple[KVCacheLayout, ...]) -> type[Any]:
    """Return vLLM's backend saying that it reads these layouts only; itself if it says so."""
    if stock.supported_kv_cache_layouts() == layouts:
        return stock
    return type(
        stock.__name__, (stock,), {"supported_kv_cache_layouts": classmethod(lambda cls: layouts)}
    )
