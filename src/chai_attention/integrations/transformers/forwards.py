"""Clustered caches for the forwards of an enabled model, and for what ``generate()`` prepares."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.cache import ClusteredCache
from chai_attention.integrations.transformers.layer import ClusteredLayer
from chai_attention.integrations.transformers.modes import eager
from chai_attention.integrations.transformers.seal import Seal
from chai_attention.integrations.transformers.static_cache import StaticClusteredCache
from chai_attention.integrations.transformers.switch import containing
from chai_attention.runtime.plan import LayerPlan
from chai_attention.runtime.shape import decoder_config

PREPARE = "_prepare_cache_for_generation"
_CACHE = "past_key_values"


def hook_forwards(
    model: PreTrainedModel,
    modules: Mapping[int, nn.Module],
    plans: tuple[LayerPlan, ...],
    seal: Seal,
) -> list[RemovableHandle]:
    """Give every forward of the model and of its decoder a clustered cache.

    Args:
        model: the model.
        modules: its attention modules, by layer.
        plans: of the layers.
        seal: checked before every forward.
    """
    config = decoder_config(model)
    # a user may call the decoder inside the causal model directly, and so do wrappers
    hooked = [m for m in containing(model, modules.values()) if isinstance(m, PreTrainedModel)]
    return [
        module.register_forward_pre_hook(
            _BeforeForward(module, config, plans, seal), with_kwargs=True
        )
        for module in hooked
    ]


class _BeforeForward:
    """The hook of one module; its arguments may come by position, which differs by family."""

    def __init__(
        self,
        module: nn.Module,
        config: PreTrainedConfig,
        plans: tuple[LayerPlan, ...],
        seal: Seal,
    ):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(module.forward).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        self._places = {name: place for place, name in enumerate(names)}
        self._config = config
        self._plans = plans
        self._seal = seal

    @eager
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = self._places

        def by_position(name: str) -> bool:
            return name not in kwargs and places.get(name, len(args)) < len(args)

        def given(name: str) -> Any:
            return args[places[name]] if by_position(name) else kwargs.get(name)

        self._seal.check()
        cache, use_cache = given(_CACHE), given("use_cache")
        if cache is None and not (self._config.use_cache if use_cache is None else use_cache):
            return args, kwargs
        cache = adopt(cache, self._plans, self._config)
        cache.begin(given("attention_mask"), self._config.num_hidden_layers)
        if not by_position(_CACHE):
            return args, {**kwargs, _CACHE: cache}
        place = places[_CACHE]
        return (*args[:place], cache, *args[place + 1 :]), kwargs


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
        # a sliding layer holds at most its window; a model without full layers has no clusters
        full = [layer for layer in cache.layers if not layer.is_sliding]
        room = (full or cache.layers)[0].get_max_length()
        if cache.is_sliding != [not plan.full_attention for plan in plans]:  # of another config
            cache.layers = StaticCache(config, room).layers
        cache.__class__ = StaticClusteredCache
        cache.take_over(plans, room)
        return cache
    announced = any(getattr(layer, "record_past", False) for layer in cache.layers)
    cache.layers = DynamicCache(config=config).layers  # without a config, it had none yet
    cache.__class__ = ClusteredCache
    cache.take_over(plans)
    if announced:
        cache.activate_past_recording()
    return cache


class ModelAttribute:
    """An attribute of a model that does not keep the model alive.

    Copied or pickled with its model, it belongs to the copy.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)

    @property
    def model(self) -> PreTrainedModel:
        """The model that it belongs to."""
        model = self._model()
        assert model is not None, "a model that is gone asks for nothing"
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _model=weakref.ref(state["_model"]))


class PreparedCache(ModelAttribute):
    """What an enabled model does where ``generate()`` prepares its cache.

    The clustered cache has to be there before the first forward: assisted decoding announces to it
    that tokens will be taken back, which a plain one does not remember, and masks are made for it.

    It stands in the model's attributes under the name `PREPARE`.

    Args:
        model: the model.
        plans: of its layers.
    """

    def __init__(self, model: PreTrainedModel, plans: tuple[LayerPlan, ...]):
        super().__init__(model)
        self._plans = plans

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Prepare the cache as transformers does, and make it a clustered one."""
        model = self.model
        found = getattr(type(model), PREPARE)(
            model, generation_config, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get(_CACHE)
        if type(cache) in (DynamicCache, StaticCache):
            cache = adopt(cache, self._plans, decoder_config(model))
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()  # it was told already, as a plain one
                # drafts with another tokenizer go back to where texts differ, before the last crop
                for layer in cache.layers:
                    if isinstance(layer, ClusteredLayer):
                        layer.keeps_past = True
        return found
