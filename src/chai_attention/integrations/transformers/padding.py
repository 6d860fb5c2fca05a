"""Which tokens of a batch are real, and where each sequence's first tokens stand."""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers.modes import lasting
from chai_attention.ops.windowed import WindowTables, window_tables


def require_cover(mask: Tensor, length: int) -> None:
    """Refuse an attention mask ``[B, S]`` of too few tokens.

    Raises:
        CacheError: cache and input hold more.
    """
    if mask.shape[1] < length:
        raise CacheError(
            f"attention_mask covers {mask.shape[1]} tokens, but cache and input hold {length}: "
            "give a mask over all of them"
        )


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
        self._tables: dict[tuple[int, int, int], WindowTables] = {}
        self._beginnings: dict[int, Tensor] = {}
        self._agreed: list[tuple[Tensor | None, int]] = []  # what `require_same` has looked at

    @cached_property
    def counts(self) -> list[int]:
        """Real tokens of each sequence; with padding, one read of the device per forward."""
        if self.valid is None:
            return [self.length] * self.batch
        return [int(count) for count in self.valid.sum(1).tolist()]

    def first_positions(self, count: int) -> Tensor:
        """``[B, count]`` int64: where the first ``count`` real tokens of each sequence stand.

        Of a sequence with fewer real tokens, the rest are positions of padding; where the batch
        is shorter than ``count``, the last position is repeated.
        """
        if count not in self._positions:
            if self.valid is None:
                order = torch.arange(self.length, device=self.device).expand(self.batch, -1)
            else:
                order = (~self.valid).to(torch.uint8).argsort(dim=1, stable=True)
            fill = torch.arange(count, device=self.device).clamp_max(self.length - 1)
            self._positions[count] = order[:, fill]
        return self._positions[count]

    def sink_positions(self, count: int) -> Tensor:
        """`first_positions` as int32."""
        if self.valid is None:
            return _plain_positions(min(count, self.length), self.batch, self.device)
        return self.first_positions(count).int()

    def window_end(self, count: int) -> int:
        """Tokens a batch must keep for every sequence to have its first ``count`` real ones."""
        if self.valid is None:
            return count
        return int(self.first_positions(count).max()) + 1

    def beginning(self, count: int) -> Tensor | None:
        """``[B, n]`` bool, real or not, up to every sequence's first ``count`` real tokens.

        None if all are real. A copy: the caller's mask may change.
        """
        if self.valid is None:
            return None
        if count not in self._beginnings:
            self._beginnings[count] = self.valid[:, : self.window_end(count)].clone()
        return self._beginnings[count]

    def require_same(self, beginning: Tensor | None, tokens: int) -> None:
        """Refuse another padding of the tokens in ``beginning``, of an earlier forward.

        Args:
            beginning: ``[B, n]`` bool, None for ``tokens`` real ones.
            tokens: as many as an earlier forward had, or as matter.

        Raises:
            CacheError: some were real and are padding now, or the other way round.
        """
        if beginning is None and self.valid is None:
            return
        if any(known is beginning and n == tokens for known, n in self._agreed):
            return  # of the layer before
        if self.valid is None:
            same = beginning is None or bool(beginning.all())
        elif beginning is None:
            same = bool(self.valid[:, :tokens].all())
        else:
            same = torch.equal(self.valid[:, : beginning.shape[1]], beginning)
        if not same:
            raise CacheError(
                "which of the first tokens in this cache are padding has changed since they came, "
                "and K of clustered heads is gone: pass an attention_mask over all tokens with "
                "every forward, for those held as before, or reset the cache"
            )
        self._agreed.append((beginning, tokens))

    def window_tables(self, queries: int, recent: int, sinks: int) -> WindowTables:
        """What each of the last ``queries`` tokens sees exactly: `ops.windowed.window_tables`."""
        if self.valid is None:
            return _plain_tables(self.length, queries, recent, sinks, self.device)
        name = (queries, recent, sinks)
        if name not in self._tables:
            self._tables[name] = window_tables(
                self.length, queries, recent, sinks, self.valid, self.device
            )
        return self._tables[name]

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


@lru_cache(maxsize=1)
def _plain_tables(
    length: int, queries: int, recent: int, sinks: int, device: torch.device
) -> WindowTables:
    """Tables without padding: made by the first layer of a forward, the same for all others."""
    return window_tables(length, queries, recent, sinks, None, device)


@lru_cache(maxsize=64)
def _plain_positions(count: int, batch: int, device: torch.device) -> Tensor:
    """``[B, count]`` int32: 0, 1, 2 and so on; the same for all steps."""
    with lasting():
        return torch.arange(count, dtype=torch.int32, device=device).expand(batch, -1)
