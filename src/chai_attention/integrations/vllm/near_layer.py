"""The layer by which vLLM keeps near pages: it has pages, and never runs.

vLLM gives pages to layers. What an exact window needs of the heads that far pages do not hold
stands in pages of one more layer, which all clustered layers of a rank share: its pages hold one
layer's near K and V after the other's. One for all makes one group of pages, whatever the layers
hold: vLLM forms groups by how many layers have pages of each size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from chai_attention.integrations.vllm.backend import ChaiBackend
from chai_attention.integrations.vllm.near_spec import NearSpec
from chai_attention.integrations.vllm.pages import PageLayout
from chai_attention.integrations.vllm.step import Step

# Groups of unequal pages share blocks, which vLLM only does where all layers' pages of a block
# stand side by side
PACKED_LAYOUTS = (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)


class NearBackend(ChaiBackend):
    """What vLLM asks about near pages."""

    layouts: ClassVar[tuple[KVCacheLayout, ...]] = PACKED_LAYOUTS

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The class that adds near pages to a step."""
        from chai_attention.integrations.vllm.metadata import NearMetadataBuilder

        return NearMetadataBuilder


@cache
def near_backend(layouts: tuple[KVCacheLayout, ...]) -> type[NearBackend]:
    """The backend class of near pages, in caches of these layouts."""
    return type("NearBackend", (NearBackend,), {"layouts": layouts})


class NearLayer(AttentionLayerBase):
    """Near pages of one rank.

    Args:
        like: a clustered layer of vLLM's, of whose kind of numbers the pages are.
        backend: of `near_backend`, with the layouts of the model's layers.
        layouts: what pages hold of each layer, by layers' names, in this order.
        numbers: per token, at least as many as the layouts have; the same on all ranks of a
            pipeline.
        far: numbers per token of the far pages of each of the model's layers.
        tokens: of a near page, from those of a far page.
        recent: w.
        sinks: s.
        probe_end: as in `NearSpec`.
    """

    def __init__(
        self,
        like: Any,
        backend: type[AttentionBackend],
        layouts: Mapping[str, PageLayout],
        numbers: int,
        far: Collection[int],
        tokens: Callable[[int], int],
        recent: int,
        sinks: int,
        probe_end: int,
    ):
        self._like = like
        self._backend = backend
        self._layouts = dict(layouts)
        ends = accumulate(layout.numbers_per_token for layout in layouts.values())
        self._starts = dict(zip(layouts, [0, *ends], strict=False))
        self._numbers = numbers
        self._far = set(far)
        self._tokens = tokens
        self.step: Step | None = None  # the one that vLLM is describing
        self._window = {"sliding_window": recent, "sinks": sinks, "probe_end": probe_end}
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Whom vLLM asks about these pages."""
        return self._backend

    def get_kv_cache_spec(self, vllm_config: Any) -> NearSpec:
        """What vLLM has to keep."""
        far = self._like.get_kv_cache_spec(vllm_config)
        page, numbers = self._tokens(far.block_size), self._numbers
        if {page * numbers} == {far.block_size * each for each in self._far}:
            numbers += 16  # pages of one size would be grouped by other rules
        return NearSpec(
            block_size=page,
            num_kv_heads=far.num_kv_heads,
            head_size=far.head_size,
            head_size_v=far.head_size_v,
            dtype=far.dtype,
            kv_quant_mode=far.kv_quant_mode,
            num_head_slots=1,
            state_content_bytes=numbers * far.dtype.itemsize,
            **self._window,
        )

    def split(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """View the near pages of one layer.

        Args:
            name: the layer's.
            dtype: of K and V in pages.

        Returns:
            K ``[P, N, removed K heads, D]`` and V ``[P, N, removed V heads, Dv]``.
        """
        return self._layouts[name].split(self.kv_cache.view(dtype), self._starts[name])
