"""Peak memory of the device that a benchmark runs on."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def release() -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    """Forget the peak so far; on CUDA, of all GPUs."""
    if device == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    elif os.access(_RESET, os.W_OK):
        try:
            _RESET.write_text("5")
        except OSError:  # not allowed in every container: `peak_bytes` then says None
            return


def peak_bytes(device: str) -> int | None:
    """Return the most bytes held since `reset_peak`: of tensors on CUDA, of the process on Linux.

    Of several GPUs, the sum of their peaks. None where the system does not tell.
    """
    if device == "cuda":
        return sum(peaks_of_gpus().values())
    try:
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def peaks_of_gpus() -> dict[str, int]:
    """Return the most bytes held on every GPU that holds any, since `reset_peak`."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    peaks = {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in range(count)}
    return {name: peak for name, peak in peaks.items() if peak}


def score_bytes(batch: int, heads: int, queries: int, size: int, dtype: torch.dtype) -> int:
    """Return what unfused attention holds: scores, float32 probabilities and their rounded copy."""
    return batch * heads * queries * size * (2 * dtype.itemsize + 4)
