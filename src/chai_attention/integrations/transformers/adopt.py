"""Which cache a forward of an enabled model works with."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedConfig, StaticCache

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers import cache as dynamic
from chai_attention.integrations.transformers import static_cache as static
from chai_attention.integrations.transformers.cache import ClusteredCache
from chai_attention.integrations.transformers.static_cache import StaticClusteredCache
from chai_attention.runtime.plan import LayerPlan


def adopt(
    cache: Any, plans: tuple[LayerPlan, ...], config: PreTrainedConfig
) -> ClusteredCache | StaticClusteredCache:
    """Return a clustered cache in place of what a forward was given.

    None gives a new `ClusteredCache`. An empty `DynamicCache` or `StaticCache`, which
    ``generate()`` makes, becomes a clustered one itself, so that everyone who holds it goes on
    holding the right cache.

    Raises:
        CacheError: a cache of another kind, of another profile, or one that holds tokens.
    """
    if isinstance(cache, ClusteredCache | StaticClusteredCache):
        if cache.plans is not plans and cache.plans != plans:
            raise CacheError(
                f"this cache was made for another profile: make one with {type(cache).__name__}"
                "(model, profile, ...), with the profile that the model is enabled with"
            )
        return cache
    if cache is None:
        cache = DynamicCache(config=config)
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        raise CacheError(
            f"clustered heads need a ClusteredCache, a StaticClusteredCache, or a plain "
            f"DynamicCache or StaticCache, not {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}: leave out "
            "past_key_values and cache_implementation, or pass ClusteredCache(model, profile)"
        )
    if int(cache.get_seq_length()):
        raise CacheError(
            "this cache already holds K of all heads: start with an empty one, or with "
            "ClusteredCache(model, profile)"
        )
    if type(cache) is StaticCache:
        _adopt_static(cache, plans, config)
    else:
        _adopt_dynamic(cache, plans, config)
    assert isinstance(cache, ClusteredCache | StaticClusteredCache)
    return cache


def _adopt_dynamic(
    cache: DynamicCache, plans: tuple[LayerPlan, ...], config: PreTrainedConfig
) -> None:
    """Make an empty cache a clustered one; without a config, it has no layers yet."""
    announced = any(getattr(layer, "record_past", False) for layer in cache.layers)
    cache.layers = DynamicCache(config=config).layers
    cache.__class__ = ClusteredCache
    assert isinstance(cache, ClusteredCache)
    dynamic.take_over(cache, plans)
    if announced:
        cache.activate_past_recording()


def _adopt_static(
    cache: StaticCache, plans: tuple[LayerPlan, ...], config: PreTrainedConfig
) -> None:
    """Make an empty cache a clustered one with as much room."""
    # a sliding layer holds at most its window; a model without full layers has no clusters
    full = [layer for layer in cache.layers if not layer.is_sliding]
    room = (full or cache.layers)[0].get_max_length()
    if cache.is_sliding != [not plan.full_attention for plan in plans]:  # of another config
        cache.layers = StaticCache(config, room).layers
    cache.__class__ = StaticClusteredCache
    static.take_over(cache, plans, room)
