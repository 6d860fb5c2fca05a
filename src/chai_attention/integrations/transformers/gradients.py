"""What tells a backward pass that clustered heads have no gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chai_attention.errors import UnsupportedModelError


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
