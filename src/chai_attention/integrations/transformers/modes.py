"""The modes of torch that attention and measurements run under, and what each of them asks for.

Graphs of ``torch.compile``, autocast, gradients, inference mode, and dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from chai_attention.errors import UnsupportedModelError

Function = TypeVar("Function", bound=Callable[..., object])


def eager(function: Function) -> Function:
    """Run ``function``, and what it calls, as it is where a model around it is compiled.

    Attention looks at lengths and padding on the host, has kernels of its own, and finds what it
    needs on tensors, where no graph looks.
    """
    return cast(Function, torch.compiler.disable(function))


def lasting() -> torch.inference_mode:
    """Where memory is made that later forwards write to; a context manager or a decorator.

    Memory made under ``torch.inference_mode()`` cannot be written to outside of it.
    """
    return torch.inference_mode(False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without dropout, which would make every measurement a different one.

    Afterwards every module is in the mode it was in: a model that is trained in parts, with
    frozen ones in eval mode, comes back as it was.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def autocast_state(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast region that is in force on a kind of device, None outside."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def as_attended(states: Tensor) -> Tensor:
    """Q, K or V in the dtype that attention would see: torch's own attention is autocast, too."""
    dtype = autocast_state(states.device.type)
    return states if dtype is None else states.to(dtype)


def no_autocast(states: Tensor) -> AbstractContextManager[object]:
    """A region where nothing is autocast: sums of attention stay in float32 where they are."""
    kind = states.device.type
    return nullcontext() if autocast_state(kind) is None else torch.autocast(kind, enabled=False)


def require_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse what torch's own attention refuses.

    Raises:
        UnsupportedModelError: Q, K and V have different dtypes.
    """
    if query.dtype == key.dtype == value.dtype:
        return
    raise UnsupportedModelError(
        f"attention got Q in {query.dtype}, K in {key.dtype} and V in {value.dtype}: load the "
        "whole model in one dtype, or run it under torch.autocast"
    )


def without_gradients(out: Tensor, *inputs: Tensor) -> Tensor:
    """Return ``out``, made from ``inputs``, so that a backward pass that reaches it is refused.

    A loss can be evaluated, with gradients enabled or not; what does not lead through attention
    gets its gradients. Only a gradient that would be wrong is not computed.
    """
    if torch.is_grad_enabled() and any(states.requires_grad for states in inputs):
        refused: Tensor = _Refuse.apply(out, *inputs)  # type: ignore[no-untyped-call]
        return refused
    return out


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedModelError(
            "no gradients flow through clustered heads: call chai_attention.disable(model) "
            "before training, or evaluate under torch.no_grad()"
        )
