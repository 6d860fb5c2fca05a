"""K and V as 8-bit floats, as servers keep them, with and without clustered heads.

Rounded to e4m3 with a scale of 1 before anything reads them, a prompt's own tokens included: what
`chai serve --kv-cache-dtype fp8` does with a checkpoint that has no scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.profiled import decides_late, narrowed_share, profile_digest
from chai_attention.integrations.transformers import ClusteredCache, enabled
from chai_attention.ops.narrow import as_stored
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


class Float8(Comparator):
    """K and V of all heads in 8 bits."""

    source = "Micikevicius et al. 2022, FP8 formats for deep learning (e4m3), as vLLM's K,V cache"
    needs_cache = True

    def __init__(self) -> None:
        self.name = "float8"

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Change nothing of the model: the cache does it."""
        return nullcontext()

    def new_cache(self, model: PreTrainedModel) -> Cache:
        """Return an empty cache that rounds."""
        return _RoundedCache(config=model.config.get_text_config(decoder=True))

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Half."""
        return SHARE

    def settings(self) -> Mapping[str, Any]:
        """The format."""
        return {"format": "e4m3", "scale": 1}


class ClusteredFloat8(Float8):
    """What the cache of clustered heads holds in 8 bits; near K and V stay in 16.

    Args:
        profile: the clusters.
    """

    source = "Agarwal et al., ICML 2024 (CHAI), with K and V in e4m3 as in vLLM's K,V cache"

    def __init__(self, profile: ClusterProfile):
        self.name = "chai+float8"
        self._profile = profile

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Enable the profile."""
        return enabled(model, self._profile)

    def new_cache(self, model: PreTrainedModel) -> Cache:
        """Return an empty cache of clustered heads that rounds."""
        return _RoundedClusteredCache(model, self._profile)

    def looks_ahead(self, context: int) -> bool:
        """Where the context is too short to decide memberships, the answer helps to do so."""
        return decides_late(self._profile, context)

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Half of what clustered heads keep, and all of near K and V.

        Args:
            model: the model, unchanged.
            length: tokens of the prompt.
        """
        return narrowed_share(self._profile, model, length, SHARE)

    def settings(self) -> Mapping[str, Any]:
        """The format, and the profile."""
        return {**super().settings(), "profile": profile_digest(self._profile)}
