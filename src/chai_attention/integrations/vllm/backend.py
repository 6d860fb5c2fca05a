"""The backend class: what vLLM asks about clustered attention before it runs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from chai_attention.integrations.vllm.options import EIGHT_BITS
from chai_attention.integrations.vllm.pages import PAGE_MULTIPLE, PageLayout
from chai_attention.integrations.vllm.prefixes import probed

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
    probe_end: ClassVar[int] = 0  # see `ProbedSpec`; 0 where it does not matter
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
        from chai_attention.integrations.vllm.metadata import ChaiMetadataBuilder

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
        return probed(own, cls.probe_end) if cls.probe_end else own


@cache
def backend_of(
    layout: PageLayout, layouts: tuple[KVCacheLayout, ...], probe_end: int = 0
) -> type[ChaiBackend]:
    """The backend class of layers with such pages, in caches of these layouts."""
    known = {"layout": layout, "layouts": layouts, "probe_end": probe_end}
    return type(f"ChaiBackend{layout.key_heads}", (ChaiBackend,), known)
