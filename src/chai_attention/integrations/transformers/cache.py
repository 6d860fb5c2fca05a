"""`ClusteredCache`: a transformers cache that keeps K of representative heads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.layer import ClusteredLayer
from chai_attention.integrations.transformers.plan import LayerPlan, layer_plans
from chai_attention.integrations.transformers.support import describe
from chai_attention.profile import ClusterProfile


@dataclass(frozen=True)
class CacheMemory:
    """What a cache holds, in bytes of allocated memory.

    Attributes:
        key_bytes: K tensors, spare room for new tokens included.
        value_bytes: V tensors, spare room included.
        probe_bytes: queries remembered while a probe window fills up.
        recent_bytes: K of removed heads, last and first tokens (the exact recent window).
        full_key_bytes: what the K of all heads would take for the same room.
        full_value_bytes: what the V would take in a full cache, for the same room.
        tokens: tokens held per sequence, padding included.
        sequences: sequences held.
    """

    key_bytes: int
    value_bytes: int
    probe_bytes: int
    recent_bytes: int
    full_key_bytes: int
    full_value_bytes: int
    tokens: int
    sequences: int

    @property
    def total_bytes(self) -> int:
        """All bytes held."""
        return self.key_bytes + self.value_bytes + self.probe_bytes + self.recent_bytes

    @property
    def full_bytes(self) -> int:
        """What K and V of all heads would take."""
        return self.full_key_bytes + self.full_value_bytes

    @property
    def saved(self) -> float:
        """Share of the full cache's bytes that is not held, 0 to 1."""
        return 1 - self.total_bytes / self.full_bytes if self.full_bytes else 0.0


class ClusteredCache(DynamicCache):
    """K of representatives, V of all heads; used like transformers' `DynamicCache`.

    ``generate()`` and ``model(...)`` make one by themselves while clustered heads are enabled;
    make one yourself to keep it over several calls (a continued chat)::

        cache = ClusteredCache(model, profile)
        model.generate(**inputs, past_key_values=cache)

    A prompt shorter than the probe window keeps K of all heads until its window is full. Sliding
    window layers are held as `DynamicCache` holds them. `crop` cannot go back into the probe
    window of a clustered layer, nor further than an exact recent window remembers: it raises
    `CacheError`.

    Args:
        model: the model or its config.
        profile: the profile that the model is enabled with.

    Raises:
        ProfileError: the profile does not fit the model.
        UnsupportedModelError: the model cannot be clustered.
    """

    plans: tuple[LayerPlan, ...]

    def __init__(
        self, model: PreTrainedModel | PreTrainedConfig, profile: ClusterProfile | str
    ) -> None:
        config = model.config if isinstance(model, PreTrainedModel) else model
        profile = ClusterProfile.resolve(profile) if isinstance(profile, str) else profile
        super().__init__(config=config.get_text_config(decoder=True))
        _take_over(self, layer_plans(describe(config), profile))

    def memory(self) -> CacheMemory:
        """Report the bytes held and what a full cache would hold."""
        return memory_of(self)


def memory_of(cache: DynamicCache) -> CacheMemory:
    """Report what any dynamic cache holds; one without clusters is a full cache itself."""
    key = value = probe = recent = full_key = sequences = 0
    for layer in cache.layers:
        layer_key, layer_value = _bytes(layer.keys), _bytes(layer.values)
        full = layer_key
        if isinstance(layer, ClusteredLayer):
            kept = 0 if layer.keys is None else layer.keys.shape[1]
            full = layer_key // kept * layer.plan.kv_heads if kept else 0
            held = layer.tensors()
            probe += _bytes(held.get("probe"))
            recent += _bytes(held.get("recent")) + _bytes(held.get("sink"))
        if layer.keys is not None:
            sequences = max(sequences, layer.keys.shape[0])
        key += layer_key
        value += layer_value
        full_key += full
    return CacheMemory(
        key_bytes=key,
        value_bytes=value,
        probe_bytes=probe,
        recent_bytes=recent,
        full_key_bytes=full_key,
        full_value_bytes=value,
        tokens=cache.get_seq_length(),
        sequences=sequences,
    )


def adopt(cache: Any, plans: tuple[LayerPlan, ...], config: PreTrainedConfig) -> ClusteredCache:
    """Return a `ClusteredCache` in place of what a forward was given.

    None gives a new one. An empty `DynamicCache`, which ``generate()`` makes, becomes one itself,
    so that everyone who holds it goes on holding the right cache.

    Raises:
        CacheError: a cache of another kind, of another profile, or one that holds tokens.
    """
    if isinstance(cache, ClusteredCache):
        if cache.plans != plans:
            raise CacheError(
                "this cache was made for another profile: make one with ClusteredCache(model, "
                "profile), with the profile that the model is enabled with"
            )
        return cache
    if cache is None:
        cache = DynamicCache(config=config)
    if type(cache) is not DynamicCache or cache.offloading:
        raise CacheError(
            f"clustered heads need a ClusteredCache or a plain DynamicCache, not "
            f"{type(cache).__name__}{' with offloading' if isinstance(cache, DynamicCache) else ''}"
            ": leave out past_key_values and cache_implementation, or pass "
            "ClusteredCache(model, profile)"
        )
    if cache.get_seq_length():
        raise CacheError(
            "this cache already holds K of all heads: start with an empty one, or with "
            "ClusteredCache(model, profile)"
        )
    cache.__class__ = ClusteredCache
    assert isinstance(cache, ClusteredCache)
    _take_over(cache, plans)
    return cache


def _take_over(cache: ClusteredCache, plans: Sequence[LayerPlan]) -> None:
    """Put clustered layers in the place of an empty cache's full-attention layers."""
    sliding = cache.layers
    cache.layers = [
        ClusteredLayer(plan) if plan.full_attention else sliding[plan.layer] for plan in plans
    ]
    cache.layer_class_to_replicate = None
    cache.plans = tuple(plans)


def _bytes(tensor: torch.Tensor | None) -> int:
    """Bytes of the memory behind a tensor, spare room included."""
    return 0 if tensor is None else tensor.untyped_storage().nbytes()
