"""The dtype that attention runs in, under ``torch.autocast`` and without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from chai_attention.errors import UnsupportedModelError


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
