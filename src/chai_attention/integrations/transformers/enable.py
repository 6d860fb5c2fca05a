"""Switching clustered heads on and off for one model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import attention, forwards, graphs
from chai_attention.integrations.transformers.corrections import Corrections
from chai_attention.integrations.transformers.plan import layer_plans
from chai_attention.integrations.transformers.projections import Projections
from chai_attention.integrations.transformers.support import attention_modules, describe
from chai_attention.profile import ClusterProfile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Enabled:
    """What `disable` has to undo."""

    profile: ClusterProfile
    implementation: str
    modules: list[nn.Module]
    corrections: Corrections
    projections: Projections
    hooks: list[RemovableHandle] = field(default_factory=list)


# one entry per enabled model; a model that is garbage collected leaves by itself
_enabled: weakref.WeakKeyDictionary[PreTrainedModel, _Enabled] = weakref.WeakKeyDictionary()


def enable(model: PreTrainedModel, profile: ClusterProfile | str | Path) -> None:
    """Run ``model`` with clustered heads from now on; undo with `disable`.

    ``model.generate`` and ``model(...)`` are used as before. Weights are not touched, with two
    exceptions, both until `disable`: a profile with a refit brings output weights of its own, and
    with a static membership the rows of W_Q and W_K of removed heads leave the model's device
    (see `Projections`). A model that is enabled already gets the new profile. Inference only: no
    gradients flow through attention while clustered heads are enabled.

    Args:
        model: a causal language model of a supported family, in float32, bfloat16 or float16.
        profile: a `ClusterProfile`, the path of one, or the name of a published schedule.

    Raises:
        ProfileError: the profile does not fit the model; the text lists what differs.
        UnsupportedModelError: the model's attention cannot be clustered.
    """
    if not isinstance(profile, ClusterProfile):
        profile = ClusterProfile.resolve(str(profile))
    plans = layer_plans(describe(model), profile)
    if model.dtype not in DTYPES:
        raise UnsupportedModelError(
            f"clustered heads run in float32, bfloat16 or float16, not {model.dtype}: load the "
            "model with one of these dtypes"
        )
    modules = attention_modules(model)
    # all that can be refused is refused before the profile in force is taken out
    Corrections.check(modules, profile.corrections or {})
    disable(model)
    corrections = Corrections(modules, profile.corrections or {})
    try:
        projections = Projections(model, modules, plans)
    except BaseException:
        corrections.undo()
        raise
    before = model.config._attn_implementation
    state = _Enabled(profile, before, list(modules.values()), corrections, projections)
    if not _enabled:
        attention.register()
    _enabled[model] = state
    weakref.finalize(model, _unregister_if_unused)
    for layer, module in modules.items():
        setattr(module, attention.PLAN_ATTRIBUTE, plans[layer])
    state.hooks = forwards.hook_forwards(model, modules, plans)
    vars(model)["get_compiled_call"] = graphs.GraphedCall(model)
    if hasattr(model, forwards.PREPARE):
        vars(model)[forwards.PREPARE] = forwards.PreparedCache(model, plans)
    model.set_attn_implementation(attention.NAME)


def disable(model: PreTrainedModel) -> None:
    """Run ``model`` as it ran before `enable`; nothing happens if it is not enabled.

    Where the device has no memory left for the rows that `enable` took out, the model stays
    enabled: free some, and call this again.
    """
    state = _enabled.get(model)
    if state is None:
        return
    state.projections.undo()
    del _enabled[model]
    for name in ("get_compiled_call", forwards.PREPARE):
        vars(model).pop(name, None)
    for hook in state.hooks:
        hook.remove()
    state.corrections.undo()
    for module in state.modules:
        delattr(module, attention.PLAN_ATTRIBUTE)
    model.set_attn_implementation(state.implementation)
    _unregister_if_unused()


def saved_weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of W_Q and W_K that `enable` took off the model's device, biases included."""
    state = _enabled.get(model)
    return 0 if state is None else state.projections.saved_bytes


@contextmanager
def enabled(model: PreTrainedModel, profile: ClusterProfile | str | Path) -> Iterator[None]:
    """Run ``model`` with clustered heads inside a ``with`` block, whatever happens in it.

    A profile that was in force before is in force again afterwards.
    """
    before = _enabled.get(model)
    enable(model, profile)
    try:
        yield
    finally:
        if before is None:
            disable(model)
        else:
            enable(model, before.profile)


def _unregister_if_unused() -> None:
    """Take our functions out of transformers' tables when no model uses them."""
    # iterating skips models that are being collected; the dictionary's length does not
    if not list(_enabled.keys()):
        attention.unregister()
