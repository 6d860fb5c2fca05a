"""What an exact recent window is: local keys by own scores, far ones shared.

Every head sees the last *w* keys and the first *s* real ones with its own Q and K. All other keys
it sees with its representative's, and a calibrated offset is added to their log-sum-exp; streaming
heads do not see them. The paper (CHAI, ICML 2024) has no such window: w = 0 is its method.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, overload

import torch
from torch import Tensor

from chai_attention.membership import Membership

LEAST_BLOCK = 64  # queries of a block of `local.band_attention` where the window is shorter


class Blocks(NamedTuple):
    """How queries are dealt into blocks: all are full but the first, which may lack its first rows.

    Attributes:
        number: of blocks.
        size: queries of a block.
    """

    number: int
    size: int

    def rows(self, block: int, queries: int) -> tuple[int, int]:
        """First query of a block, below 0 for rows that the first one lacks, and its end."""
        start = queries - (self.number - block) * self.size
        return start, start + self.size


def blocks_of(queries: int, recent: int) -> Blocks:
    """Deal ``queries`` into blocks for a window of ``recent`` keys."""
    size = min(queries, max(recent, LEAST_BLOCK))
    return Blocks(-(-queries // size), size)


@dataclass(frozen=True, eq=False)
class WindowTables:
    """Who sees what in one forward; the same for all layers. Made by `window_tables`.

    Attributes:
        recent: w, cache positions that count as local; padding between tokens counts too.
        queries: Q, the last tokens of the sequences.
        length: S, all tokens.
        sinks: s, first real tokens that are always local; no more than the sequences' length.
        sink_positions: ``[B or 1, s]`` int32, where they stand; S for those that a sequence lacks.
        ordinary: ``[B or 1, S]`` bool, False for padding and sinks.
        far: the stretch of keys that holds all far ones; None if there are none.
        far_valid: ``[B, keys of far]`` bool, False for padding and sinks; None if all are far.
        padded: whether there is padding.
    """

    recent: int
    queries: int
    length: int
    sinks: int
    sink_positions: Tensor
    ordinary: Tensor
    far: slice | None
    far_valid: Tensor | None
    padded: bool

    def bias(self, block: int) -> Tensor | None:
        """What each query of a block of `band_attention` does not see; None if it sees all."""
        blocks = blocks_of(self.queries, self.recent)
        start = blocks.rows(block, self.queries)[0]
        first = self.length - self.queries + start - self.recent + 1  # key of the first column
        if not self.padded and first >= self.sinks:
            if blocks.size == 1:
                return None
            block = blocks.number  # all these are alike
        if self.padded:
            return self._bias(start, first, blocks.size)  # for each sequence: too much to keep
        if block not in self._biases:
            self._biases[block] = self._bias(start, first, blocks.size)
        return self._biases[block]

    @cached_property
    def _biases(self) -> dict[int, Tensor]:
        return {}

    def _bias(self, start: int, first: int, size: int) -> Tensor:
        """``[B or 1, size, columns]`` float32 of queries from ``start`` and keys from ``first``.

        The far keys' column is seen by all: their log-sum-exp knows who sees them.
        """
        device = self.ordinary.device
        query = torch.arange(size, device=device)[:, None] + self.length - self.queries + start
        key = first + torch.arange(size + self.recent - 1, device=device)
        exists = (key >= 0) & (key < self.length)
        band = self.ordinary[:, key.clamp(0, self.length - 1)] & exists  # [B, width]
        seen = band[:, None] & (key <= query) & (key > query - self.recent)
        sink = self.sink_positions[:, None] <= query  # [B, size, s]
        far = torch.ones_like(seen[..., :1])
        seen = torch.cat([seen, sink, far], -1)
        return torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)


def window_tables(
    length: int,
    queries: int,
    recent: int,
    sinks: int,
    valid: Tensor | None,
    device: torch.device,
) -> WindowTables:
    """Make the tables of the last ``queries`` of ``length`` tokens.

    Args:
        length: S, tokens so far, new ones and padding included.
        queries: Q.
        recent: w, at least 1.
        sinks: s.
        valid: ``[B, S]`` bool, False for padding; None if all tokens are real.
        device: where to make them; nothing is read on the host.
    """
    sinks = min(sinks, length)
    other = length - recent  # keys behind these are local to every query
    if valid is None:
        far = slice(sinks, other) if other > sinks else None
        position = torch.arange(length, dtype=torch.int32, device=device)[None]
        ordinary, position = position >= sinks, position[:, :sinks]
        return WindowTables(
            recent, queries, length, sinks, position, ordinary, far, None, padded=False
        )
    position = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, :sinks]
    position = torch.where(valid.gather(1, position), position, length).int()
    ordinary = valid & (valid.cumsum(1) > sinks)
    far = slice(0, other) if other > 0 else None
    far_valid = None if far is None else ordinary[:, far]
    return WindowTables(
        recent, queries, length, sinks, position, ordinary, far, far_valid, padded=True
    )


@overload
def head_offsets(offsets: Tensor, membership: Membership) -> Tensor: ...


@overload
def head_offsets(offsets: Tensor | None, membership: Membership) -> Tensor | None: ...


def head_offsets(offsets: Tensor | None, membership: Membership) -> Tensor | None:
    """What is added to the log-sum-exp of each head's far keys: ``[B, H]`` float32.

    A representative needs nothing: its far scores are its own. To a streaming head far keys weigh
    nothing: minus infinity.

    Args:
        offsets: ``[H, H]`` (head, representative); None for zeros.
        membership: of B rows.

    Returns:
        None where all would be zeros.
    """
    rep = membership.representatives
    if offsets is None and not membership.streaming:
        return None
    offset = torch.zeros(rep.shape, device=rep.device)
    if offsets is not None:
        heads = torch.arange(membership.heads, device=rep.device)
        offset = torch.where(rep == heads, offset, offsets[heads, rep])
    return offset.masked_fill(membership.streams, -torch.inf) if membership.streaming else offset
