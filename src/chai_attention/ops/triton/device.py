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


@cache
def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that a program can have, in bytes."""
    if device.type != "cuda":
        return 227 * 1024  # the interpreter has no bound
    # AMD's GPUs do not tell, and have as much
    return int(
        getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 << 10)
    )
