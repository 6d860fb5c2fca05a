"""K and V as 8-bit floats, as servers keep them, with and without clustered heads.

Rounded to e4m3 with a scale of 1 before anything reads them, a prompt's own tokens included: what
`chai serve --kv-cache-dtype fp8` does with a checkpoint that has no scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from chai_attention.evaluation.profiled import LowBitCache
from chai_attention.integrations.transformers import ClusteredCache
from chai_attention.ops.fp8 import as_stored
from chai_attention.profile import ClusterProfile

SHARE = 8 / 16  # of a server's bytes for a number in K and V


class _Rounding:
    """Rounds what a cache is given."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Cache.update`, with K and V ``[B, G, S, D]`` rounded first."""
        key, value = as_stored(key_states), as_stored(value_states)
        found: tuple[Tensor, Tensor] = super().update(  # type: ignore[misc]
            key, value, layer_idx, *args, **kwargs
        )
        return found


class _RoundedCache(_Rounding, DynamicCache):
    """K and V of all heads."""


class _RoundedClusteredCache(_Rounding, ClusteredCache):
    """K of representatives, V of all heads."""


class Float8(LowBitCache):
    """K and V in 8 bits.

    Args:
        profile: of clustered heads; None for all heads.
    """

    def __init__(self, profile: ClusterProfile | None = None):
        super().__init__("float8", profile)
        self.source = (
            "Micikevicius et al. 2022, FP8 formats for deep learning (e4m3), as vLLM's K,V cache"
            if profile is None
            else "Agarwal et al., ICML 2024 (CHAI), with K and V in e4m3 as in vLLM's K,V cache"
        )

    def new_cache(self, model: PreTrainedModel) -> Cache:
        """Return an empty cache that rounds."""
        if self._profile is not None:
            return _RoundedClusteredCache(model, self._profile)
        return _RoundedCache(config=model.config.get_text_config(decoder=True))

    def number_share(self, model: PreTrainedModel) -> float:
        """Half."""
        return SHARE

    def settings(self) -> Mapping[str, Any]:
        """The format, and the profile."""
        return {"format": "e4m3", "scale": 1, **super().settings()}
