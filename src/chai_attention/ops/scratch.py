"""Buffers for temporary tensors of CPU operations, kept from call to call.

The system hands out large pieces of memory page by page as they are first touched, which in a
decode step can take longer than the arithmetic.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

MOST = 2**21  # numbers; what is larger is not kept


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}


_kept = _Kept()


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of any content for a tensor on the CPU; valid until this thread asks again.

    Args:
        shape: of the tensor, which is contiguous.
        dtype: of its numbers; every dtype has memory of its own.
    """
    numbers = prod(shape)
    if numbers > MOST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    held = _kept.memory.get(dtype)
    if held is None or held.numel() < numbers:
        # made under inference_mode, it could not be written to outside of it
        with torch.inference_mode(False):
            held = torch.empty(numbers, dtype=dtype, device="cpu")
        _kept.memory[dtype] = held
    return held[:numbers].view(shape)


def widened(states: Tensor, dtype: torch.dtype) -> Tensor:
    """``states`` in a wider dtype; in `scratch` memory unless it has that dtype already."""
    if states.dtype == dtype:
        return states
    return scratch(tuple(states.shape), dtype).copy_(states)


def shaped(memory: Tensor, *shape: int) -> Tensor:
    """Use the first numbers of ``memory`` as a tensor of ``shape``."""
    return memory[: prod(shape)].view(shape)
