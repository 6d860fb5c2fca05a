"""Chooses the implementation of clustered attention for the tensors at hand."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import blocked, dense, reference

logger = logging.getLogger("chai_attention")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    *,
    scale: float,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention by the fastest implementation for the tensors' device.

    Arguments, results and meaning are those of `ops.reference.attention`. The CPU runs blocked
    matrix products, CUDA the Triton kernels; where no head is clustered, torch's own fused
    attention runs if it is faster. Other devices run the readable reference, with a warning.
    """
    module = _implementation(query, membership, lengths, softcap, return_lse)
    logger.debug(
        "attention by %s: query %s key %s", module.__name__, tuple(query.shape), tuple(key.shape)
    )
    return module.attention(
        query,
        key,
        value,
        membership,
        scale=scale,
        lengths=lengths,
        valid=valid,
        softcap=softcap,
        return_lse=return_lse,
    )


def _implementation(
    query: Tensor,
    membership: Membership,
    lengths: Tensor | None,
    softcap: float | None,
    return_lse: bool,
) -> ModuleType:
    device = query.device.type
    plain = membership.is_identity and lengths is None and softcap is None and not return_lse
    if device == "cpu":
        # torch's decode in 16-bit types is slower than ours
        slow = query.shape[2] <= blocked.DECODE_ROWS and query.dtype != torch.float32
        return dense if plain and not slow else blocked
    if device == "cuda":
        # without clusters torch's prefill is faster than ours; decode is not
        return dense if plain and query.shape[2] > 1 else _triton()
    _warn_slow(device)
    return reference


@cache
def _triton() -> ModuleType:
    from chai_attention.ops import triton

    return triton


@cache
def _warn_slow(device: str) -> None:
    warnings.warn(
        f"chai-attention has no kernel for device {device!r}: the reference runs instead. It saves "
        "K cache but computes every head's probabilities at full size; use the CPU or CUDA for "
        "speed",
        stacklevel=3,
    )
