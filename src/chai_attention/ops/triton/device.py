"""Properties of the device on which the choice of kernels and grids depends."""

from __future__ import annotations

from functools import cache

import torch


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    if device.type != "cuda":
        return 16  # the interpreter: enough that it splits contexts too
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; (0, 0) for the interpreter."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.get_device_capability(device)
