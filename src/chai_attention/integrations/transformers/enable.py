"""Switching clustered heads on and off for one model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import attention, forwards, graphs
from chai_attention.integrations.transformers.corrections import Corrections
from chai_attention.integrations.transformers.devices import hook_masks, on_several_devices
from chai_attention.integrations.transformers.modes import lasting
from chai_attention.integrations.transformers.modules import attention_modules, decoder_layers
from chai_attention.integrations.transformers.seal import Seal
from chai_attention.integrations.transformers.switch import Switch, register, unregister
from chai_attention.integrations.transformers.trial import require_runnable
from chai_attention.profile import ClusterProfile
from chai_attention.profile_files import require_refit_weights
from chai_attention.runtime.plan import LayerPlan, layer_plans
from chai_attention.runtime.shape import describe, unwrapped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_STATE = "_chai_enabled"


@dataclass(eq=False)
class _Enabled:
    """What `disable` has to undo. It stands in the model's attributes, and is copied with it."""

    profile: ClusterProfile
    modules: list[nn.Module]
    corrections: Corrections
    seal: Seal
    switch: Switch
    hooks: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._use()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._use()

    def _use(self) -> None:
        """Keep our functions in transformers' tables for as long as this object lives."""
        if not list(_in_use):
            register(attention.NAME, attention.clustered_attention, attention.padding_mask)
        _in_use.add(self)
        weakref.finalize(self, _unregister_if_unused).atexit = False


# one entry per enabled model; that of a model that is garbage collected leaves by itself
_in_use: weakref.WeakSet[_Enabled] = weakref.WeakSet()


def enable(model: PreTrainedModel, profile: ClusterProfile | str | Path) -> None:
    """Run ``model`` with clustered heads from now on; undo with `disable`.

    ``model.generate`` and ``model(...)`` are used as before. Weights are not touched, with one
    exception until `disable`: a profile with a refit brings output weights of its own, which can be
    neither saved nor changed meanwhile (see `Seal`). A model that is enabled already gets the new
    profile. Inference only: a loss can be evaluated, but a backward pass through attention is
    refused.

    A copy of an enabled model (``copy.deepcopy``, pickle) is an enabled model of its own. A model
    of a family that is not tested runs six tokens once, to find out whether it can be clustered.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from chai_attention import ClusterProfile, disable, enable
    >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=64, **sizes)).eval()
    >>> ids = torch.randint(3, 64, (1, 40))
    >>> plain = model(ids).logits
    >>> enable(model, ClusterProfile((2, 4)))  # each request is clustered on its first 32 tokens
    >>> out = model(ids)
    >>> out.logits.shape, type(out.past_key_values).__name__
    (torch.Size([1, 40, 64]), 'ClusteredCache')
    >>> disable(model)
    >>> torch.equal(model(ids).logits, plain)
    True

    Args:
        model: a causal language model of a supported family, in float32, bfloat16 or float16; or
            a PEFT model around one.
        profile: a `ClusterProfile`, the path of one, or the name of a published schedule.

    Raises:
        ProfileError: the profile does not fit the model; the text lists what differs.
        UnsupportedModelError: the model's attention cannot be clustered.
    """
    model = unwrapped(model)
    profile = ClusterProfile.resolve(profile)
    require_refit_weights(profile.provenance, model.config.name_or_path)
    shape = describe(model)
    plans = layer_plans(shape, profile)
    if model.dtype not in DTYPES:
        raise UnsupportedModelError(
            f"clustered heads run in float32, bfloat16 or float16, not {model.dtype}: load the "
            "model with one of these dtypes"
        )
    modules = attention_modules(model)
    before = _state_of(model)
    # all that can be refused is refused before the profile in force is taken out
    Corrections.check(modules, profile.corrections or {})
    if before is None:
        if attention.is_enabled(model):
            raise UnsupportedModelError(
                "clustered heads are enabled for a part of this model, or for a model around it: "
                "call chai_attention.disable() with that one first"
            )
        require_runnable(model, modules, shape)
    disable(model)
    try:
        _switch_on(model, profile, plans, modules)
    except BaseException:  # such as no memory for a refit
        if before is not None:
            _switch_on(model, before.profile, layer_plans(shape, before.profile), modules)
        raise


@lasting()
def _switch_on(
    model: PreTrainedModel,
    profile: ClusterProfile,
    plans: tuple[LayerPlan, ...],
    modules: dict[int, nn.Module],
) -> None:
    """Enable what has been checked; a failure leaves the model as it was."""
    corrections = Corrections(modules, profile.corrections or {})
    changed = dict.fromkeys(corrections.changed, "holds refit weights")
    seal = Seal(model, modules.values(), changed)
    switch = Switch(model, modules.values(), attention.NAME)
    state = _Enabled(profile, [*modules.values()], corrections, seal, switch)
    vars(model)[_STATE] = state
    for layer, module in modules.items():
        setattr(module, attention.PLAN_ATTRIBUTE, plans[layer])
    state.hooks = forwards.hook_forwards(model, modules, plans, seal)
    if on_several_devices(model):
        state.hooks += hook_masks(decoder_layers(model))
    vars(model)["get_compiled_call"] = graphs.GraphedCall(model)
    if hasattr(model, forwards.PREPARE):
        vars(model)[forwards.PREPARE] = forwards.PreparedCache(model, plans)


@lasting()
def disable(model: PreTrainedModel) -> None:
    """Run ``model`` as it ran before `enable`; nothing happens if it is not enabled."""
    model = unwrapped(model)
    state = _state_of(model)
    if state is None:
        return
    del vars(model)[_STATE]
    for name in ("get_compiled_call", forwards.PREPARE):
        vars(model).pop(name, None)
    for hook in state.hooks:
        hook.remove()
    state.seal.undo()
    state.corrections.undo()
    for module in state.modules:
        delattr(module, attention.PLAN_ATTRIBUTE)
    state.switch.undo()


def _state_of(model: PreTrainedModel) -> _Enabled | None:
    return vars(model).get(_STATE)


@contextmanager
def enabled(model: PreTrainedModel, profile: ClusterProfile | str | Path) -> Iterator[None]:
    """Run ``model`` with clustered heads inside a ``with`` block, whatever happens in it.

    A profile that was in force before is in force again afterwards.
    """
    model = unwrapped(model)
    before = _state_of(model)
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
    # iterating skips what is being collected; the length does not
    if not list(_in_use):
        unregister(attention.NAME)
