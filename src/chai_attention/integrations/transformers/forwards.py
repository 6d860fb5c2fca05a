"""What happens before the forwards of an enabled model, and where ``generate()`` prepares them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from chai_attention.integrations.transformers.adopt import adopt
from chai_attention.integrations.transformers.eager import eager
from chai_attention.integrations.transformers.layer import ClusteredLayer
from chai_attention.integrations.transformers.seal import Seal
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


class PreparedCache:
    """What an enabled model does where ``generate()`` prepares its cache.

    The clustered cache has to be there before the first forward: assisted decoding announces to it
    that tokens will be taken back, which a plain one does not remember, and masks are made for it.

    It stands in the model's attributes under the name `PREPARE`.

    Args:
        model: the model, which is not kept alive by it.
        plans: of its layers.
    """

    def __init__(self, model: PreTrainedModel, plans: tuple[LayerPlan, ...]):
        self._model = weakref.ref(model)
        self._plans = plans

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Prepare the cache as transformers does, and make it a clustered one."""
        model = self._model()
        assert model is not None, "a model that is gone generates nothing"
        prepare = getattr(type(model), PREPARE)
        found = prepare(model, generation_config, model_kwargs, *args, **kwargs)
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

    def __getstate__(self) -> tuple[PreTrainedModel | None, tuple[LayerPlan, ...]]:
        """Copied or pickled with its model, it belongs to the copy."""
        return self._model(), self._plans

    def __setstate__(self, state: tuple[PreTrainedModel, tuple[LayerPlan, ...]]) -> None:
        self._model = weakref.ref(state[0])
        self._plans = state[1]
