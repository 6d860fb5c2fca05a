"""Which tokens of a batch are real, and where each sequence's first tokens stand."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Padding:
    """The padding of all tokens of a forward, cached and new; shared by all layers.

    Args:
        valid: ``[B, S]`` bool, True for real tokens; None if all are.
        batch: B.
        length: S.
        device: where tables are made.
    """

    def __init__(self, valid: Tensor | None, batch: int, length: int, device: torch.device):
        self.valid = valid
        self.batch = batch
        self.length = length
        self.device = device
        self._positions: dict[int, Tensor] = {}

    @cached_property
    def counts(self) -> list[int]:
        """Real tokens of each sequence; with padding, one read of the device per forward."""
        if self.valid is None:
            return [self.length] * self.batch
        return [int(count) for count in self.valid.sum(1).tolist()]

    def window_positions(self, window: int) -> Tensor:
        """``[B, W]`` int64: where the first ``window`` real tokens of each sequence stand.

        Of a sequence with fewer real tokens, the rest are positions of padding; where the batch
        is shorter than the window, the last position is repeated.
        """
        if window not in self._positions:
            if self.valid is None:
                order = torch.arange(self.length, device=self.device).expand(self.batch, -1)
            else:
                order = (~self.valid).to(torch.uint8).argsort(dim=1, stable=True)
            fill = torch.arange(window, device=self.device).clamp_max(self.length - 1)
            self._positions[window] = order[:, fill]
        return self._positions[window]

    def window_end(self, window: int) -> int:
        """Tokens a batch must keep for every sequence to have its whole window."""
        if self.valid is None:
            return window
        return int(self.window_positions(window).max()) + 1

    def token_index(self, queries: int) -> Tensor:
        """``[B, Q]``: how many real tokens stand before each of the last ``queries`` tokens."""
        if self.valid is None:
            index = torch.arange(self.length - queries, self.length, device=self.device)
            return index.expand(self.batch, -1)
        return (self.valid.cumsum(1) - 1)[:, -queries:]

    def select(self, rows: list[int]) -> Padding:
        """Return the padding of some sequences of the batch."""
        valid = None if self.valid is None else self.valid[rows]
        part = Padding(valid, len(rows), self.length, self.device)
        part.counts = [self.counts[row] for row in rows]
        return part
