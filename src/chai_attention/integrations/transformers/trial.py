"""A trial before clustered heads are switched on: does the model attend as they assume?

Names and configs do not say all of it: a family may bring other heads to attention than its config
says, take K from another layer's cache, or make a mask of its own. So a model of a family that is
not tested against the definition runs a few tokens once, with all heads in clusters of their own,
and every call of attention is compared with what the family's own code makes of it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chai_attention.errors import ChaiError, UnsupportedModelError
from chai_attention.integrations.transformers.attention import (
    PLAN_ATTRIBUTE,
    clustered_attention,
    padding_mask,
)
from chai_attention.integrations.transformers.cache import ClusteredCache
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.memory import LAYER_TAG
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.integrations.transformers.switch import switched
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.plan import layer_plans
from chai_attention.runtime.shape import FAMILIES, ModelShape, supported

logger = logging.getLogger("chai_attention")

_NAME = "chai_trial"
_TOKENS, _PADDED = 6, 2  # of two sequences, the second one has padding
# how far attention may be off, as a share of its largest number
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_passed: set[tuple[Any, ...]] = set()  # classes and configs that need no second trial


def require_runnable(
    model: PreTrainedModel, modules: Mapping[int, nn.Module], shape: ModelShape
) -> None:
    """Refuse a model whose attention would fail, or be computed wrongly, with clustered heads.

    Nothing runs for tested families, and only once for every class and config.

    Args:
        model: the model, without clustered heads.
        modules: its attention modules.
        shape: of its attention.

    Raises:
        UnsupportedModelError: what is different in this family.
    """
    kinds = [type(module) for module in modules.values()]
    tested = shape.architecture in FAMILIES and all(
        kind.__module__.startswith("transformers.models.") for kind in kinds
    )
    config = model.config.get_text_config(decoder=True)
    key = (type(model), *kinds, config.to_json_string(use_diff=False))
    if tested or key in _passed or model.device.type == "meta":
        return
    try:
        with torch.no_grad(), evaluating(model):
            if _runs(model, modules, shape):
                _passed.add(key)
    except _DifferentError as error:
        raise UnsupportedModelError(
            f"the attention of {shape.architecture} cannot run with clustered heads: {error}; "
            f"{supported()}"
        ) from error


class _DifferentError(Exception):
    """How a model's attention differs from what clustered heads assume."""


def _runs(model: PreTrainedModel, modules: Mapping[int, nn.Module], shape: ModelShape) -> bool:
    """Run a few tokens; False if the model does not run them on its own either."""
    whole = ClusterProfile(clusters=(shape.heads,) * shape.layers)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(2 * _TOKENS, device=input_device(model)).view(2, -1) % min(vocabulary, 32)
    real = torch.ones_like(ids)
    real[1, :_PADDED] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real, "use_cache": True}
    calls = _Calls(modules, shape, real.bool())
    for plan, module in zip(layer_plans(shape, whole), modules.values(), strict=True):
        setattr(module, PLAN_ATTRIBUTE, plan)
    failed: Exception | None = None
    try:
        with switched(model, modules.values(), _NAME, calls, padding_mask):
            cache = ClusteredCache(model, whole)
            cache.begin(real, shape.layers)
            model(**inputs, past_key_values=cache)
    except _DifferentError:
        raise
    except Exception as error:
        failed = error
    finally:
        for module in modules.values():
            delattr(module, PLAN_ATTRIBUTE)
    if failed is None:
        calls.require_all()
        return True
    if isinstance(failed, torch.OutOfMemoryError):
        raise failed
    try:
        model(**inputs)
    except Exception as error:  # it wants other inputs, and nothing can be said about it
        logger.info("%s could not be tried out: %s", type(model).__name__, error)
        return False
    raise _DifferentError(_first_line(failed)) from failed


class _Calls:
    """The attention function of a trial: compares, and goes on with what the family computes."""

    def __init__(self, modules: Mapping[int, nn.Module], shape: ModelShape, real: Tensor):
        self._layers = {module: layer for layer, module in modules.items()}
        self._shape = shape
        self._real = real
        self._seen: list[int] = []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        layer, shape = self._layers[module], self._shape
        if layer in self._seen:
            raise _DifferentError(f"layer {layer} attends more than once")
        self._seen.append(layer)
        for name, states, heads in (
            ("queries", query, shape.heads),
            ("K", key, shape.kv_heads),
            ("V", value, shape.kv_heads),
        ):
            if tuple(states.shape[:3]) != (*self._real.shape[:1], heads, self._real.shape[1]):
                raise _DifferentError(
                    f"layer {layer} brings {name} of {states.shape[1]} heads and "
                    f"{states.shape[2]} tokens, where {heads} and {self._real.shape[1]} are meant"
                )
        cached = getattr(key, LAYER_TAG, None)
        if cached is not None and cached.plan.layer != layer:
            raise _DifferentError(f"layer {layer} takes K from layer {cached.plan.layer}")
        options["dropout"] = 0.0
        theirs = _own(module)(
            module,
            query,
            key,
            value,
            self._added(attention_mask, query),
            **options,
        )[0]
        try:
            ours = clustered_attention(module, query, key, value, attention_mask, **options)[0]
        except ChaiError as error:
            raise _DifferentError(_first_line(error)) from error
        if ours.shape != theirs.shape:
            raise _DifferentError(
                f"layer {layer} puts out {list(theirs.shape)}, not {list(ours.shape)}"
            )
        real = self._real.to(theirs.device)
        want, got = theirs[real].float(), ours[real].float()
        off, scale = (got - want).abs().max(), want.abs().max()
        # NaN is no answer: the weights are broken, not the way they are used
        if bool(off > _TOLERANCE.get(query.dtype, 5e-2) * scale):
            raise _DifferentError(
                f"layer {layer} computes something else (off by {float(off / scale):.0%})"
            )
        return theirs, None

    def require_all(self) -> None:
        """Refuse layers that never asked."""
        missing = sorted(set(self._layers.values()) - set(self._seen))
        if missing:
            raise _DifferentError(f"layer {missing[0]} does not attend to the text's tokens")

    def _added(self, mask: Tensor | None, query: Tensor) -> Tensor:
        """What a family's eager attention adds to the scores, ``[B, 1, Q, S]``."""
        if mask is None or mask.ndim == 2:
            size = self._real.shape[1]
            past = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
            real = torch.ones_like(self._real) if mask is None else self._real
            mask = past & real.to(query.device)[:, None, None]
        if mask.dtype == torch.bool:
            added = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
            return added.masked_fill(~mask, torch.finfo(query.dtype).min)
        return mask


def _own(module: nn.Module) -> Callable[..., Any]:
    """The attention function that the family's own code brings along."""
    code = sys.modules[type(module).__module__]
    own: Callable[..., Any] = getattr(code, "eager_attention_forward", sdpa_attention_forward)
    return own


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    what = text[0] if text else "no reason given"
    return what if isinstance(error, ChaiError) else f"{type(error).__name__}: {what}"
