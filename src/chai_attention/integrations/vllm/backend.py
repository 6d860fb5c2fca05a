"""The backends of a model's layers: what vLLM asks about clustered attention before it runs.

Layers without clusters run a native backend of vLLM's, which is faster than ours on full pages.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from chai_attention.integrations.vllm.kv_cache import far_pages
from chai_attention.integrations.vllm.layers import PAGE_MULTIPLE, PageLayout
from chai_attention.integrations.vllm.options import EIGHT_BITS

# Groups of unequal pages share blocks, which vLLM only does where all layers' pages of a block
# stand side by side
PACKED_LAYOUTS = (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)
LEAST_FLOAT8 = (8, 9)  # compute capability that converts 8-bit floats


class ChaiBackend(AttentionBackend):
    """Clustered attention over pages that hold K of representatives and V of all heads.

    vLLM asks for pages layer by layer but does not say for which layer. So each layer gets a
    subclass that knows its pages (`backend_of`).
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *EIGHT_BITS]
    forward_includes_kv_cache_update = True
    layout: ClassVar[PageLayout | None] = None
    probe_end: ClassVar[int | None] = None  # see `FarSpec`; None for pages as vLLM has them
    # layouts in which a page of a layer is one run of memory, whatever other layers have
    layouts: ClassVar[tuple[KVCacheLayout, ...]] = (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @staticmethod
    def get_name() -> str:
        """The name of a member of vLLM's list of backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """The class that attends."""
        from chai_attention.integrations.vllm.impl import ChaiAttention

        return ChaiAttention

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The class that describes batches."""
        from chai_attention.integrations.vllm.builder import ChaiMetadataBuilder

        return ChaiMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages are never split, so any multiple."""
        return [MultipleOf(PAGE_MULTIPLE)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """The kernels take any up to 256."""
        return head_size <= 256

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Why options do not go together; None if they do."""
        if kv_cache_dtype in EIGHT_BITS and device_capability < LEAST_FLOAT8:
            return "a K,V cache of fp8 needs a GPU of compute capability 8.9: use auto"
        return None

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Memberships would not travel with the pages."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layouts of the whole cache that this layer can read, the preferred one first."""
        return cls.layouts

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Give the layer pages of its own size."""
        if cls.layout is None:
            return spec
        element = spec.dtype.itemsize
        own = replace(
            spec,
            num_head_slots=1,
            state_content_bytes=cls.layout.page_bytes(1, element),
        )
        return own if cls.probe_end is None else far_pages(own, cls.probe_end)


@cache
def backend_of(
    layout: PageLayout, layouts: tuple[KVCacheLayout, ...], probe_end: int | None = None
) -> type[ChaiBackend]:
    """The backend class of layers with these pages and layouts of the cache."""
    known = {"layout": layout, "layouts": layouts, "probe_end": probe_end}
    return type(f"ChaiBackend{layout.key_heads}", (ChaiBackend,), known)


class LocalBackend(ChaiBackend):
    """What vLLM asks about local pages."""

    layouts: ClassVar[tuple[KVCacheLayout, ...]] = PACKED_LAYOUTS

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The class that adds local pages to a step."""
        from chai_attention.integrations.vllm.builder import LocalMetadataBuilder

        return LocalMetadataBuilder


@cache
def local_backend(layouts: tuple[KVCacheLayout, ...]) -> type[LocalBackend]:
    """The backend class of local pages, with these layouts of the cache."""
    return type("LocalBackend", (LocalBackend,), {"layouts": layouts})


def native_backend(config: Any, layer: Any, dtype: torch.dtype) -> type[Any] | None:
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


def run_natively(module: Any, native: type[Any], act_dtype: torch.dtype) -> None:
    """Let a native backend run a layer that was made for ours.

    Args:
        module: vLLM's ``Attention``, whose ``impl`` is ours.
        native: of `native_backend`.
        act_dtype: of the hidden states.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    ours = module.impl
    module.attn_backend = native
    module.backend = AttentionBackendEnum[native.get_name()]
    module.impl = native.get_impl_cls()(
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
    own: tuple[KVCacheLayout, ...], native: type[Any] | None
) -> tuple[KVCacheLayout, ...]:
    """Layouts of the cache that all layers of a model can read, ours and vLLM's.

    With pipeline parallelism every rank has to name the same ones, whichever layers it has.

    Args:
        own: those of clustered layers, the preferred one first.
        native: what runs the layers without clusters; None if the model has none.
    """
    read = None if native is None else native.supported_kv_cache_layouts()
    if read is None:
        return own
    pages = [_in_a_page(layout) for layout in read]
    return tuple(layout for layout in own if _in_a_page(layout) in pages)


def _in_a_page(layout: KVCacheLayout) -> list[int]:
    """The order of dimensions within a layer; where layers lie, kernels see by the strides."""
    return [dim for dim in layout.value if dim]


def with_far_pages(native: type[Any], probe_end: int) -> type[Any]:
    """Return a native backend whose pages are looked after as those of clustered layers are.

    One manager looks after the pages of all layers, so all need the same rule.
    """

    def customize_spec(cls: type[Any], spec: Any) -> Any:
        return far_pages(native.customize_spec(spec), probe_end)

    return type(native.__name__, (native,), {"customize_spec": classmethod(customize_spec)})


def limited_to(native: type[Any], layouts: tuple[KVCacheLayout, ...]) -> type[Any]:
    """Return a native backend that names these layouts only; itself if it does so already."""
    if native.supported_kv_cache_layouts() == layouts:
        return native
    return type(
        native.__name__, (native,), {"supported_kv_cache_layouts": classmethod(lambda cls: layouts)}
    )
