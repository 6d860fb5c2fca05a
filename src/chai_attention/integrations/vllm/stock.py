"""Layers without clusters run vLLM's own attention, which is faster than ours on full pages."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheLayout

from chai_attention.integrations.vllm.options import EIGHT_BITS
from chai_attention.integrations.vllm.prefixes import probed


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
            and (layer.kv_cache_dtype not in EIGHT_BITS or _float8_on_cpu(layer.head_size))
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


def give_way(module: Any, stock: type[Any], act_dtype: torch.dtype) -> None:
    """Let vLLM's own backend run a layer that was made for ours.

    Args:
        module: vLLM's ``Attention``, whose ``impl`` is ours.
        stock: the other backend.
        act_dtype: of the hidden states.
    """
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    ours = module.impl
    module.attn_backend = stock
    module.backend = AttentionBackendEnum[stock.get_name()]
    module.impl = stock.get_impl_cls()(
        ours.num_heads,
        ours.head_size,
        ours.scale,
        ours.num_kv_heads,
        None,
        None,
        ours.kv_cache_dtype,
        ours.softcap,
        AttentionType.DECODER,
        None,
    )
    if ours.kv_cache_dtype in EIGHT_BITS and module.impl.supports_quant_query_input:
        # vLLM makes this with a layer, where it asked our backend, which reads queries as they are
        from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
        from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

        module.query_quant = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR)
    module.impl.process_weights_after_loading(act_dtype)


def _float8_on_cpu(head_size: int) -> bool:
    """Whether vLLM's attention for CPUs reads 8-bit pages here."""
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_supported()
    return bool(fast) and head_size % 32 == 0


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
    if read is None:
        return own
    pages = [_in_a_page(layout) for layout in read]
    return tuple(layout for layout in own if _in_a_page(layout) in pages)


def _in_a_page(layout: KVCacheLayout) -> list[int]:
    """The order of what lies in one layer; where the layers are, kernels take from strides."""
    return [dim for dim in layout.value if dim]


def with_prefixes(stock: type[Any], probe_end: int) -> type[Any]:
    """Return vLLM's backend with pages whose prefixes are found as clustered layers need it.

    One manager looks after the pages of all layers.
    """

    def customize_spec(cls: type[Any], spec: Any) -> Any:
        return probed(stock.customize_spec(spec), probe_end)

    return type(stock.__name__, (stock,), {"customize_spec": classmethod(customize_spec)})


def limited_to(stock: type[Any], layouts: tuple[KVCacheLayout, ...]) -> type[Any]:
    """Return vLLM's backend saying that it reads these layouts only; itself if it says so."""
    if stock.supported_kv_cache_layouts() == layouts:
        return stock
    return type(
        stock.__name__, (stock,), {"supported_kv_cache_layouts": classmethod(lambda cls: layouts)}
    )
