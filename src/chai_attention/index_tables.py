"""Makes small tables of heads, keeps them on their device, and checks them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def table_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A shared table that must not be written to: ``[n]`` int64."""
    if device.type == "cuda":  # where making it waits for all that runs
        return _kept_table(numbers, device)
    return torch.tensor(numbers, dtype=torch.long, device=device)


@lru_cache(maxsize=4096)
def _kept_table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # also for what needs gradients
        return torch.tensor(numbers, dtype=torch.long, device=device)


def marked(positions: Tensor, size: int) -> Tensor:
    """``[B, size]`` bool, True at ``positions [B, n]``."""
    flags = torch.zeros(positions.shape[0], size, dtype=torch.bool, device=positions.device)
    return flags.scatter_(1, positions, True)


def true_positions(flags: Tensor, count: int) -> Tensor:
    """Positions of the first ``count`` true flags of each row, ascending: ``[B, count]``.

    Contiguous, as kernels read it at every step.
    """
    size = flags.shape[1]
    position = torch.arange(size, device=flags.device)
    return torch.where(flags, position, position + size).argsort(1)[:, :count].contiguous()


def checked_clusters(rep: Tensor, streaming: tuple[int, ...]) -> int:
    """Validate a ``[B, H]`` vector and return its number of clusters."""
    heads = rep.shape[1]
    if heads == 0 or rep.shape[0] == 0:
        raise ValueError("a membership needs at least one sequence and one head")
    if bool(((rep < 0) | (rep >= heads)).any()):
        raise ValueError(f"a representative is not a head: heads are 0 to {heads - 1}")
    if bool((rep.gather(1, rep) != rep).any()):
        raise ValueError("a representative must be its own representative")
    if streaming and not 0 <= streaming[0] <= streaming[-1] < heads:
        raise ValueError(f"a streaming head is not a head: heads are 0 to {heads - 1}")
    alone = torch.ones(heads, dtype=torch.bool)
    alone[list(streaming)] = False
    alone = alone.to(rep.device)  # False for streaming heads
    each = torch.arange(heads, device=rep.device)
    if bool(((rep != each) & ~(alone & alone[rep])).any()):
        raise ValueError("a streaming head represents itself alone: nobody can use its scores")
    counts = ((rep == each) & alone).sum(1)
    if bool((counts != counts[0]).any()):
        raise ValueError(
            f"every sequence of a batch needs the same number of clusters, not {counts.tolist()}"
        )
    return int(counts[0])
