"""Decode with an exact recent window over fixed memory: rings of K, and V, of the removed heads.

Heads whose K the cache does not hold need it for the last *w* keys and the first real ones, the
sinks, and so do streaming heads their V. Both stand in memories of fixed size, so that a decode
step changes no shape and can be captured in a CUDA graph. What is computed is
`reference.recent_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.reference import near_and_far


@dataclass(frozen=True, eq=False)
class NearRing:
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

    def select(self, rows: Tensor) -> NearRing:
        """Return the sequences ``rows``."""
        return NearRing(
            self.ring[rows], self.sinks[rows], self.sink_positions[rows], self.recent, self.begin,
            None if self.value_ring is None else self.value_ring[rows],
            None if self.value_sinks is None else self.value_sinks[rows],
        )  # fmt: skip

    @property
    def memories(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Ring and sinks of K, and of V where V heads stream."""
        if self.value_ring is None or self.value_sinks is None:
            return ((self.ring, self.sinks),)
        return (self.ring, self.sinks), (self.value_ring, self.value_sinks)


def decode_recent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    near: NearRing,
    *,
    lengths: Tensor | None = None,
    scale: float,
    offset: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with one query per sequence; nothing is read on the host on CUDA.

    Args:
        query: ``[B, H, 1, D]``, all heads in their natural order.
        key: ``[B, kept_keys, S, D]``, in the order of ``membership.key_heads``.
        value: ``[B, kept_values, S, Dv]``, in the order of ``membership.value_heads``.
        membership: tables of B rows, or of one for all.
        near: K and V of the other heads; holds the new token's already.
        lengths: ``[B]`` int32, keys of each sequence, the new one included; None for S.
        scale: factor on the scores.
        offset: ``[B, H]`` float32, added to the log-sum-exp of each head's far keys
            (`windowed.head_offsets`); None for zeros.
        valid: ``[B, S]`` bool, False for padding; the sinks are the first keys that are not.
        softcap: as in `ops.reference.attention`.

    Returns:
        ``[B, 1, H, Dv]``.
    """
    if query.device.type == "cuda":
        from chai_attention.ops.triton import launch_decode

        return launch_decode.decode_recent(
            query, key, value, membership, near,
            lengths=lengths, scale=scale, offset=offset, valid=valid, softcap=softcap,
        )  # fmt: skip
    # the CPU's imports the ring from here
    from chai_attention.ops import near_decode

    run = near_decode.decode_recent if query.device.type == "cpu" else reference_decode_recent
    return run(
        query, key, value, membership, near,
        lengths=lengths, scale=scale, offset=offset, valid=valid, softcap=softcap,
    )  # fmt: skip


def reference_decode_recent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    near: NearRing,
    *,
    lengths: Tensor | None = None,
    scale: float,
    offset: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`decode_recent` in plain PyTorch: puts K of all heads together, sequence by sequence."""
    if membership.batch != query.shape[0]:
        membership = membership.expand(query.shape[0])
    size, dim = key.shape[2:]
    position = torch.arange(size, device=key.device)
    if lengths is None:
        lengths = torch.full((query.shape[0],), size, device=key.device)
    last = lengths.long()[:, None]
    real = position < last
    if valid is not None:
        real = real & valid[:, :size]
    # K and V of removed heads at every position; what no memory holds is far: nobody asks for it
    oldest = (last - 1 - (last - 1 - position) % near.size).clamp_min(0)
    held = torch.where(position == oldest, (position + near.shift) % near.size, 0)  # [B, S]
    is_sink = torch.zeros_like(real)
    caches, memories = [key, value], near.memories
    for index, (ring, sinks) in enumerate(memories):
        removed = ring.gather(
            2, held[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3])
        )  # [B, removed heads, S, D]
        for column in range(sinks.shape[2]):
            at = near.sink_positions[:, column].long()
            here = (position == at[:, None]) & real
            is_sink |= here
            # inside the window the ring holds the same
            removed = torch.where(here[:, None, :, None], sinks[:, :, column, None], removed)
        caches[index] = torch.cat([caches[index], removed], 1)
    every, values = caches  # [B, G, S, D], [B, G, S, Dv]
    every = every.gather(1, membership.key_place[:, :, None, None].expand(-1, -1, size, dim))
    place = membership.value_place[:, :, None, None].expand(-1, -1, size, value.shape[3])
    values = values.gather(1, place).masked_fill(~real[:, None, :, None], 0.0)
    is_near = (position >= last - near.recent) | is_sink
    return near_and_far(
        query, every, values, membership, is_near[:, None, None], real[:, None, None],
        scale=scale, offset=offset, softcap=softcap,
    ).to(value.dtype)  # fmt: skip
