"""An exact recent window over fixed memory: rings of K, and V, of the removed heads.

Heads whose K the cache does not hold need it for the last *w* keys and the first real ones, the
sinks, and so do streaming heads their V. Both stand in memories of fixed size, so that a decode
step changes no shape and can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RollingBuffer:
    """K and V that no cache holds, near the end and at the start of every sequence.

    Attributes:
        ring: ``[B, G - kept, R, D]`` in the order of ``membership.removed_key_heads``; position p
            stands at ``(p - begin) % R``; ``R >= recent``, or all tokens if they are fewer.
        sinks: ``[B, G - kept, s, D]``, K of the first s real tokens.
        sink_positions: ``[B, s]`` int32, their cache positions, ascending; -1 where a sequence
            has fewer.
        recent: w.
        begin: a position whose K stands first in the ring.
        value_ring: ``[B, G - kept_values, R, Dv]``, V in the order of
            ``membership.removed_value_heads``, as ``ring``; None if no V head streams.
        value_sinks: ``[B, G - kept_values, s, Dv]``, as ``sinks``.
    """

    ring: Tensor
    sinks: Tensor
    sink_positions: Tensor
    recent: int
    begin: int = 0
    value_ring: Tensor | None = None
    value_sinks: Tensor | None = None

    @property
    def size(self) -> int:
        """R, tokens that the ring holds."""
        return self.ring.shape[2]

    @property
    def shift(self) -> int:
        """Position p stands at ``(p + shift) % R``, which no position makes negative."""
        return -self.begin % self.size

    @property
    def memories(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Ring and sinks of K, and of V where V heads stream."""
        if self.value_ring is None or self.value_sinks is None:
            return ((self.ring, self.sinks),)
        return (self.ring, self.sinks), (self.value_ring, self.value_sinks)
