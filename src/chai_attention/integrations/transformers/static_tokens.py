"""The state of a static cache: its length on host and device, its padding, its first tokens.

A model on several devices has tables on each of them: those of its first layer's device, and
`StaticTokens` beside them for every other one, which a forward advances when it comes there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.memory import STOPPED
from chai_attention.integrations.transformers.modes import lasting
from chai_attention.integrations.transformers.padding import Padding, require_cover


class StaticTokens:
    """What all layers of a static cache know about the tokens they hold.

    Every sequence holds equally many, padding included. Their number stands on the host, for
    checks and shapes, and on the device, for kernels: a decode step changes the device's tensors
    in place, without a look at them, so that it can be captured in a CUDA graph. The cache changes
    the first device's tables, which pass every change on to those of the other devices.

    Args:
        capacity: tokens that a sequence can hold.
        sinks: s, first real tokens that every head attends to with its own scores; 0 for none.
        first: the tables of the device that a forward reaches first; None for these themselves.

    Attributes:
        count: tokens held, those of the running forward included.
        lengths: ``[B]`` int32 on the device, the same.
        start: ``[B]`` int32, position of the first token of the running forward.
        sink_positions: ``[B, s]`` int32, where the first real tokens stand, -1 for those to come.
        padding: of the tokens held.
    """

    lengths: Tensor
    start: Tensor
    sink_positions: Tensor
    padding: Padding

    def __init__(self, capacity: int, sinks: int, first: StaticTokens | None = None):
        self.capacity = capacity
        self.sinks = min(sinks, capacity)
        self.count = 0
        self.batch = 0
        self._first = first
        self._others: dict[torch.device, StaticTokens] = {}
        self._mask: Tensor | None = None
        self._told: Tensor | None = None  # the mask of the running forward
        self._valid: Tensor | None = None  # [B, capacity], True in spare room
        self._is_padded = False

    @property
    def valid(self) -> Tensor | None:
        """``[B, capacity]`` bool, False for padding; None if all tokens are known to be real."""
        return self._valid if self._is_padded else None

    def at(self, device: torch.device) -> StaticTokens:
        """The tables on ``device``; the first device asked for is the first of all."""
        if not self.batch or self.lengths.device == device:
            return self
        if device not in self._others:
            other = StaticTokens(self.capacity, self.sinks, first=self)
            other.offer(self._told)
            self._others[device] = other
        return self._others[device]

    @property
    def devices(self) -> int:
        """How many devices the layers are on, as far as they were reached."""
        return 1 + len(self._others)

    def tensors(self) -> list[Tensor]:
        """All memory that is held."""
        if not self.batch:
            return []
        held = [self.lengths, self.start, self.sink_positions]
        held += [tensor for other in self._others.values() for tensor in other.tensors()]
        return held if self._valid is None else [*held, self._valid]

    def allocate(self, batch: int, device: torch.device) -> None:
        """Make the tables, or check that they are for ``batch`` sequences on ``device``.

        Raises:
            CacheError: they are not.
        """
        if not self.batch:
            self.batch = batch
            with lasting():
                self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
                self.start = torch.zeros_like(self.lengths)
                shape = (batch, self.sinks)
                self.sink_positions = torch.full(shape, -1, dtype=torch.int32, device=device)
                self._columns = torch.arange(self.sinks, dtype=torch.int32, device=device)
            return
        if batch != self.batch:
            raise CacheError(
                f"this static cache holds {self.batch} sequences, not {batch}: make another one"
            )
        if device != self.lengths.device:
            raise CacheError(
                f"this static cache has a layer on {self.lengths.device} that runs on {device} "
                "now: make another one for a model that has been moved"
            )

    def offer(self, mask: Tensor | None) -> None:
        """Remember the 2D attention mask of the next forward, which `advance` looks at."""
        self._mask = self._told = mask
        for other in self._others.values():
            other.offer(mask)

    def require(self, queries: int) -> None:
        """Check that there is room.

        Raises:
            CacheError: there is none.
        """
        if self.count + queries > self.capacity:
            raise CacheError(
                f"this static cache has room for {self.capacity} tokens a sequence, padding "
                f"included; it holds {self.count} and was given {queries} more: make one with a "
                "larger max_tokens, or use ClusteredCache, which grows"
            )

    def advance(self, queries: int) -> None:
        """Count the new tokens of a forward that begins.

        Raises:
            CacheError: no room, a mask that does not cover all tokens, or a device that an
                earlier forward did not reach.
        """
        if self._first is not None and self.count + queries != self._first.count:
            raise CacheError(STOPPED)
        self.require(queries)
        mask, self._mask = self._mask, None
        if mask is not None:
            self.take(mask, queries)
        self.start.copy_(self.lengths)
        self.lengths.add_(queries)
        self.count += queries
        valid = None if self.valid is None else self.valid[:, : self.count]
        self.padding = Padding(valid, self.batch, self.count, self.lengths.device)
        if self.sinks:
            self._find_sinks(queries)

    def take(self, mask: Tensor, queries: int) -> None:
        """Take the padding of old tokens and ``queries`` new ones from ``mask [B, S or more]``.

        Padding that was told once is remembered: new tokens without a mask are real. A mask with
        a single new token is not looked at on the host.

        Raises:
            CacheError: it covers too few tokens.
        """
        total = self.count + queries
        require_cover(mask, total)
        mask = mask[:, :total]
        if not self._is_padded:
            if queries > 1 and bool(mask.all()):
                return
            self._is_padded = True
            if self._valid is None:
                shape = (self.batch, self.capacity)
                with lasting():
                    self._valid = torch.ones(shape, dtype=torch.bool, device=self.lengths.device)
        assert self._valid is not None
        self._valid[:, :total].copy_(mask)

    def replayed(self) -> None:
        """Count a token per sequence that a replayed graph has written."""
        self.count += 1
        for other in self._others.values():
            other.replayed()

    def crop(self, keep: int) -> None:
        """Go back to ``keep`` tokens."""
        for other in self._others.values():
            other.crop(keep)
        self.count = keep
        self.lengths.fill_(keep)
        self.sink_positions.masked_fill_(self.sink_positions >= keep, -1)
        if self._valid is not None:
            self._valid[:, keep:] = True

    def reset(self) -> None:
        """Forget all tokens and their padding."""
        self._mask = self._told = None
        self._is_padded = False
        for other in self._others.values():
            other.reset()
        if self.batch:
            self.crop(0)

    def select(self, rows: Tensor) -> None:
        """Put the sequences ``rows [B]`` in the place of all."""
        for other in self._others.values():
            other.select(rows)
        rows = rows.to(self.lengths.device)
        self.sink_positions.copy_(self.sink_positions[rows])
        if self._valid is not None:
            self._valid.copy_(self._valid[rows])

    def _find_sinks(self, queries: int) -> None:
        """Bring `sink_positions` up to date; for one new token without a look at the device."""
        if queries > 1:
            found = min(self.sinks, self.count)
            positions = self.padding.first_positions(found)
            if self.valid is not None:
                positions = positions.masked_fill(~self.valid.gather(1, positions), -1)
            self.sink_positions.fill_(-1)
            self.sink_positions[:, :found].copy_(positions)
            return
        if self.valid is None:
            there = self._columns < self.lengths[:, None]
            self.sink_positions.copy_(torch.where(there, self._columns, -1))
            return
        new = self.start[:, None]
        old = self.sink_positions.masked_fill(self.sink_positions >= new, -1)
        next_column = (old >= 0).sum(1, keepdim=True)
        is_next = (self._columns == next_column) & self.valid.gather(1, new.long())
        self.sink_positions.copy_(torch.where(is_next, new, old))
