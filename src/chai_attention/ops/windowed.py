"""Clustered attention with an exact recent window: near keys by own scores, far ones shared.

Every head sees the last *w* keys and the first *s* real ones with its own Q and K. All other
keys are seen with its representative's, whose log-sum-exp is shifted by a calibrated offset, or
not at all by a streaming head. The paper (CHAI, ICML 2024) has no such window: w = 0 is its method.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import near as near_part
from chai_attention.ops.dispatch import attention as clustered
from chai_attention.ops.near import Far, NearKeys, blocks_of


@dataclass(frozen=True, eq=False)
class WindowTables:
    """Who sees what in one forward; the same for all layers. Made by `window_tables`.

    Attributes:
        recent: w, cache positions that count as near; padding between tokens counts too.
        queries: Q, the last tokens of the sequences.
        length: S, all tokens.
        sinks: s, first real tokens that are always near; no more than the sequences' length.
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
        """What each query of a block of `near.attention` does not see; None if it sees all."""
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
    other = length - recent  # keys behind these are near to every query
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


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    near: NearKeys,
    tables: WindowTables,
    *,
    scale: float,
    offset: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of the last Q tokens; `reference.recent_attention` is the definition.

    Args:
        query: ``[B, H, Q, D]``, all heads in their natural order.
        key: ``[B, kept_keys, S, D]``, in the order of ``membership.key_heads``.
        value: ``[B, kept_values, S, Dv]``, in the order of ``membership.value_heads``.
        membership: tables of B rows.
        near: K and V of the near keys, of all K/V heads.
        tables: of these S tokens and Q queries.
        scale: factor on the scores.
        offset: ``[B, H]`` float32 added to the log-sum-exp of the far keys (`head_offsets`); None
            for zeros, which is for memberships without streaming heads.
        softcap: as in `ops.reference.attention`.

    Returns:
        ``[B, Q, H, Dv]`` in the dtype of ``value``.
    """
    if query.device.type == "cuda" and query.shape[2] > 1:
        from chai_attention.ops.triton import window

        fused = window.attention(
            query, key, value, membership, near, tables,
            scale=scale, offset=offset, softcap=softcap,
        )  # fmt: skip
        if fused is not None:
            return fused
    if not query.is_cuda and _only_streams(membership, tables, offset):
        return _beside_streaming(
            query, key, value, membership, near, tables, scale=scale, softcap=softcap
        )
    out = lse = None
    if tables.far is not None and membership.far is not None:
        # Without its last w keys, the causal rule of clustered attention hides just what is near.
        # Queries before the last ones as many as keys would see none.
        keys, values = key[:, :, tables.far], value[:, :, tables.far]
        late = query[:, :, max(0, query.shape[2] - keys.shape[2]) :]
        heads = membership.slot_heads[:, :, None, None].expand(-1, -1, *late.shape[2:])
        out, lse = clustered(
            late.gather(1, heads),
            keys,
            values,
            membership.far,
            scale=scale,
            valid=tables.far_valid,
            softcap=softcap,
            return_lse=True,
        )
    if query.device.type == "cuda":
        from chai_attention.ops.triton import near_prefill

        return near_prefill.attention(
            query, near, tables, membership, out, lse, scale=scale, offset=offset, softcap=softcap
        )
    far = None
    if out is not None and lse is not None:
        lse = lse.gather(1, membership.slot[:, :, None].expand(-1, -1, lse.shape[2]))
        seers = list(membership.far_heads) if membership.streaming else None
        far = Far(out, lse if offset is None else lse + offset[:, :, None], seers)
    return near_part.attention(
        query,
        near,
        tables.bias,
        far,
        recent=tables.recent,
        sinks=tables.sinks,
        padded=tables.padded,
        scale=scale,
        softcap=softcap,
    )


def _only_streams(membership: Membership, tables: WindowTables, offset: Tensor | None) -> bool:
    """Whether heads see all keys with their own scores, or near ones only, and none is padding."""
    far = membership.far
    if not membership.streaming or tables.padded or far is None or not far.is_identity:
        return False
    return offset is None or not bool(offset[:, list(membership.far_heads)].any())


def _beside_streaming(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    near: NearKeys,
    tables: WindowTables,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`attention` where `_only_streams`: to all other heads there is no window."""
    assert membership.far is not None
    heads, streams = list(membership.far_heads), list(membership.streaming)
    groups = membership.removed_value_heads[0]
    whole, _ = clustered(query[:, heads], key, value, membership.far, scale=scale, softcap=softcap)
    some = near_part.attention(
        query[:, streams],
        NearKeys(near.key[:, groups], near.value[:, groups]),
        tables.bias,
        None,
        recent=tables.recent,
        sinks=tables.sinks,
        padded=False,
        scale=scale,
        softcap=softcap,
    )
    out = whole.new_empty(*whole.shape[:2], membership.heads, whole.shape[3])
    for part, numbers in ((whole, heads), (some, streams)):
        out.index_copy_(2, torch.tensor(numbers, device=out.device), part)
    return out


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
