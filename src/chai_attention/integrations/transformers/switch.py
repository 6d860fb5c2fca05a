"""Sets the attention function of a decoder's own modules, though configs are shared.

Transformers reads the name of the function from a config, and configs are shared: by several
models, and by a decoder with whatever stands beside it (a vision tower). So the modules that lead
to attention get a *view* of their config: it has the same attributes, read and written through,
and a name of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from chai_attention.errors import UnsupportedModelError

_FIELD = "_attn_implementation_internal"  # what transformers' own property reads


class Switch:
    """Lets attention modules, and all that contain them, ask for another function until `undo`.

    Args:
        model: the model.
        modules: its attention modules.
        name: under which the function and its mask are registered.
    """

    def __init__(self, model: PreTrainedModel, modules: Iterable[nn.Module], name: str):
        path = containing(model, modules)
        configs = {id(m.config): m.config for m in path if _has_config(m)}
        views: dict[int, PreTrainedConfig] = {}

        def view(config: PreTrainedConfig) -> PreTrainedConfig:
            if id(config) not in views:
                parts = {part: getattr(config, part, None) for part in config.sub_configs}
                views[id(config)] = _view(
                    config, name, {k: view(v) for k, v in parts.items() if id(v) in configs}
                )
            return views[id(config)]

        self._before = [(m, m.config) for m in path if _has_config(m)]
        for module, config in self._before:
            module.config = view(config)

    def undo(self) -> None:
        """Give the modules their own configs back."""
        for module, config in self._before:
            module.config = config
        self._before = []


@contextmanager
def switched(
    model: PreTrainedModel,
    modules: Iterable[nn.Module],
    name: str,
    attention: Callable[..., Any],
    mask: Callable[..., Any],
) -> Iterator[None]:
    """Let attention modules ask for ``attention`` and ``mask`` inside a ``with`` block."""
    register(name, attention, mask)
    try:
        switch = Switch(model, modules, name)
        try:
            yield
        finally:
            switch.undo()
    finally:
        unregister(name)


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make ``attn_implementation=name`` known to transformers."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def unregister(name: str) -> None:
    """Undo `register`."""
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def containing(model: nn.Module, modules: Iterable[nn.Module]) -> list[Any]:
    """``modules`` and all modules of ``model`` that contain one of them, outermost first."""
    names = {id(module): name for name, module in model.named_modules()}
    wanted = {""}
    for module in modules:
        parts = names[id(module)].split(".")
        wanted |= {".".join(parts[: end + 1]) for end in range(len(parts))}
    return [module for name, module in model.named_modules() if name in wanted]


def _has_config(module: nn.Module) -> bool:
    return isinstance(vars(module).get("config"), PreTrainedConfig)


def _view(
    config: PreTrainedConfig, name: str, parts: dict[str, PreTrainedConfig]
) -> PreTrainedConfig:
    """``config`` under the attention function ``name``, with views in place of some parts."""
    kind = type(config)

    # by identity: torch.compile takes vars(view) and vars(config) for two
    def chosen(self: PreTrainedConfig) -> Any:
        return name if self is view else vars(self).get(_FIELD)

    def refuse(self: PreTrainedConfig, value: Any) -> None:
        if self is not view:
            # a config of its own: generate() of some releases makes one to compare with
            vars(self)[_FIELD] = value
        elif value != name:
            raise UnsupportedModelError(
                f"the attention of this model cannot be switched to {value!r} while clustered "
                "heads are enabled: call chai_attention.disable(model) first"
            )

    def copied(self: PreTrainedConfig, memo: dict[int, Any]) -> PreTrainedConfig:
        # alone, such as for a new model, it is a config; with its model it stays a view
        if not memo:
            return copy.deepcopy(config)
        return _view(*copy.deepcopy((config, name, parts), memo))

    def shallow(self: PreTrainedConfig) -> PreTrainedConfig:
        # a view's attributes are the config's own: what is written to a copy must not be
        return copy.copy(config)

    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__copy__": shallow,
        "__deepcopy__": copied,
        "__reduce__": lambda self: (_view, (config, name, parts)),
        _FIELD: property(chosen, refuse),
    }
    for part in parts:
        members[part] = property(lambda self, part=part: parts[part])  # type: ignore[misc]
    view: PreTrainedConfig = object.__new__(type(kind.__name__, (kind,), members))
    object.__setattr__(view, "__dict__", vars(config))
    return view
