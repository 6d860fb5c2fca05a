"""Notices what is done to a model's attention and weights while clustered heads are enabled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.switch import containing

_FIRST = "call chai_attention.disable(model) before"


class Seal:
    """Refuses what would read, or change, weights that are not the model's own, until `undo`.

    While it is in force, ``state_dict()`` and ``load_state_dict()`` of what holds such weights are
    refused before anything is read or written. Modules, weights, hooks and adapters that are put
    in the place of sealed ones are found by `check`, which every forward calls: a few comparisons
    of objects per layer.

    Args:
        model: the model.
        modules: its attention modules, which must stay where they are.
        changed: projections whose weights are not the model's own, and why ("hold ...").
    """

    def __init__(
        self, model: PreTrainedModel, modules: Iterable[nn.Module], changed: Mapping[Any, str]
    ):
        self._changed = dict(changed)
        self._names = {module: name for name, module in model.named_modules()}
        watched = {*modules, *changed}
        self._slots = [  # where a module stands: its parent, its name there, itself
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child in watched
        ]
        self._states = [(projection, _state(projection)) for projection in changed]
        self._hooks: list[RemovableHandle] = []
        for projection, why in changed.items():
            saving = _Refuse(
                f"{self._names[projection]} {why} while clustered heads are enabled: {_FIRST} "
                "saving it, or use chai export"
            )
            self._hooks.append(projection.register_state_dict_pre_hook(saving))
        if changed:
            loading = _Refuse(
                f"projections of this model {next(iter(changed.values()))} while clustered heads "
                f"are enabled: {_FIRST} loading weights into it"
            )
            for module in containing(model, changed):  # the outermost is asked first
                self._hooks.append(module.register_load_state_dict_pre_hook(loading))

    def check(self) -> None:
        """Raise if a sealed module is not what it was.

        Raises:
            UnsupportedModelError: what has changed, and what to do.
        """
        for parent, name, child in self._slots:
            if parent._modules.get(name) is not child:
                found = type(parent._modules.get(name)).__name__
                self._refuse(child, f"is a {found} now")
        for projection, state in self._states:
            if not _same(_state(projection), state):
                self._refuse(projection, "has other weights or hooks now")

    def undo(self) -> None:
        """Allow everything again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _refuse(self, module: nn.Module, what: str) -> None:
        why = self._changed.get(module)
        reason = f", but {why}" if why is not None else ""
        raise UnsupportedModelError(
            f"{self._names[module]} {what}{reason}: take that back, then {_FIRST} changing the "
            "model, and enable it again"
        )


def _state(projection: Any) -> tuple[Any, ...]:
    """What of a projection must stay the same: weight, bias, kind, forward, number of hooks."""
    parameters = projection._parameters
    return (
        parameters.get("weight"),
        parameters.get("bias"),
        type(projection),
        vars(projection).get("forward"),
        len(projection._forward_hooks) + len(projection._forward_pre_hooks),
    )


def _same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    *objects, last = zip(now, before, strict=True)
    return all(one is other for one, other in objects) and last[0] is last[1]


class _Refuse:
    """Hook that refuses the call it stands before; copied and pickled with its module."""

    def __init__(self, message: str):
        self.message = message

    def __call__(self, *args: Any) -> None:
        raise UnsupportedModelError(self.message)
