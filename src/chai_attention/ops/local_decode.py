"""Decode with an exact recent window on the CPU: one softmax over far and local scores.

Scores of representatives are made for all keys. Every head gets a row of them, in which those of
local keys give way to its own, so that one product with V does for both. Where torch's fused
attention is faster, it does the far keys, which are then one key more for the softmax over the
local ones. Local K, and V of streaming heads, are read where they stand in their rings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import choice, fused
from chai_attention.ops.blocked import (
    Row,
    RowTables,
    by_row,
    decode_scores,
    row_tables,
    weighted_values,
)
from chai_attention.ops.call import AttentionCall, DenseKV
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.scratch import widened


@dataclass(frozen=True, eq=False)
class _Tables:
    """One row's membership. "Own rows" are heads by their K/V head: kept ones, then removed ones.

    Attributes:
        far: of the heads that see far keys; None if there are none.
        leaders: ``[k]`` int64, the representatives.
        kept: ``[kept * group]`` int64, heads of the kept K heads; None if all of them represent.
        removed: ``[removed * group]`` int64, heads of the other K heads.
        far_heads: ``[H']`` int64, heads that see far keys; None for all.
        row_heads: ``[H']`` int64, head of each row of the far part, in the order of V.
        followers: ``[n]`` int64, rows of the far part, in the order of V, that are no leader's.
        own_of_followers: ``[n]`` int64, their own rows; None if these are just the own rows.
        streamers: ``[m]`` int64, heads whose V only the ring holds.
        own_of_streamers: ``[m]`` int64, their own rows; None if these are just the own rows.
    """

    far: RowTables | None
    leaders: Tensor
    kept: Tensor | None
    removed: Tensor
    far_heads: Tensor | None
    row_heads: Tensor
    followers: Tensor
    own_of_followers: Tensor | None
    streamers: Tensor
    own_of_streamers: Tensor | None


@lru_cache(maxsize=4096)
def _tables(
    representatives: tuple[int, ...], kv_heads: int, kept_keys: int, streaming: tuple[int, ...]
) -> _Tables:
    heads = len(representatives)
    clusters = len(set(representatives)) - len(streaming)
    one = Membership(torch.tensor([representatives]), clusters, kv_heads, kept_keys, streaming)
    group = one.group_size

    def heads_of(groups: Tensor) -> list[int]:
        return [g * group + i for g in groups[0].tolist() for i in range(group)]

    leaders = set(one.slot_heads[0].tolist())
    kept, removed = heads_of(one.key_heads), heads_of(one.removed_key_heads)
    if set(kept) <= leaders:
        kept = []
    own = {head: row for row, head in enumerate([*kept, *removed])}
    far, in_order = None, []
    if one.far is not None:
        far = row_tables(one.far.host_rows[0], one.far.kv_heads, one.far.kept_keys)
        place = one.value_slot[0].tolist()
        in_order = sorted(one.far_heads, key=place.__getitem__)
    follows = [row for row, head in enumerate(in_order) if head in own and head not in leaders]
    own_of_followers = [own[in_order[row]] for row in follows]
    streamers = heads_of(one.removed_value_heads)
    same = own_of_followers == list(range(len(own)))
    return _Tables(
        far,
        one.slot_heads[0],
        torch.tensor(kept) if kept else None,
        torch.tensor(removed, dtype=torch.long),
        None if len(in_order) == heads else torch.tensor(one.far_heads, dtype=torch.long),
        torch.tensor(in_order, dtype=torch.long),
        torch.tensor(follows, dtype=torch.long),
        None if same else torch.tensor(own_of_followers, dtype=torch.long),
        torch.tensor(streamers, dtype=torch.long),
        None if streamers == list(own) else torch.tensor([own[h] for h in streamers]).long(),
    )


def decode_recent(query: Tensor, kv: DenseKV, local: RollingBuffer, call: AttentionCall) -> Tensor:
    """`dispatch.decode_recent` on the CPU."""
    batch, heads = query.shape[:2]
    key, value, valid, offset = kv.key, kv.value, kv.valid, call.offset
    membership = call.membership
    if membership.batch != batch:
        membership = membership.expand(batch)
    sizes = [key.shape[2]] * batch if kv.lengths is None else kv.lengths.tolist()
    if valid is not None and bool(valid.all()):
        valid = None
    by_torch = valid is None and fused.can_run(query, kv, call.softcap)
    if by_torch:
        kind = choice.kind_of(query, max(sizes), clustered=True)
        by_torch = choice.chosen(kind) == choice.TORCH
    out = value.new_empty(batch, 1, heads, value.shape[3])
    for index, size in enumerate(sizes):
        if not size:
            out[index] = 0.0
            continue
        tables = _tables(
            membership.host_rows[index], membership.kv_heads, membership.kept_keys,
            membership.streaming,
        )  # fmt: skip
        row = Row(
            query[index],
            key[index, :, :size],
            value[index, :, :size],
            None if valid is None else valid[index, :size],
            call.scale,
            call.softcap,
        )
        shift = None if offset is None else offset[index]
        part = None
        if by_torch and membership.far is not None:
            part = membership.far if batch == 1 else membership.far.select(torch.tensor([index]))
        _decode(row, tables, local, index, shift, part, out[index])
    return out


def _decode(
    row: Row,
    tables: _Tables,
    local: RollingBuffer,
    index: int,
    offset: Tensor | None,
    membership: Membership | None,
    out: Tensor,
) -> None:
    """The sequence ``index``, into ``out [1, H, Dv]``; ``offset`` is ``[H]``.

    ``membership`` is that of the heads that see far keys, if torch's fused attention does these.
    """
    size, query = row.key.shape[1], row.scaled_query
    places = _Places.of(local, index, size)
    window, sink = _own_scores(row, query, tables, local, index, places)
    if tables.far is not None:
        far_out = out
        if tables.far_heads is not None:
            far_out = out.new_empty(1, len(tables.row_heads), out.shape[2])
        leaders = query.index_select(0, tables.leaders)
        far = _Far(row, leaders, tables, tables.far, offset, window, sink)
        merges = membership is not None and places.at == list(range(len(places.at)))
        if merges and len(places.at) + places.window < size:
            assert membership is not None
            far.merge(membership, places, far_out)
        else:
            far.attend(places, far_out)
        if tables.far_heads is not None:
            out.index_copy_(1, tables.far_heads, far_out)
    if len(tables.streamers):
        own_rows, parts = tables.own_of_streamers, (window, sink)
        if own_rows is not None:
            parts = (window.index_select(0, own_rows), sink.index_select(0, own_rows))
        scores = torch.cat(parts, 1)
        seen = None
        if row.valid is not None:
            seen = torch.cat([row.valid[size - places.window :], row.valid[places.at]])
        probs = _probabilities(scores, seen).to(out.dtype)
        out.index_copy_(1, tables.streamers, _ring_values(probs, local, index, places)[None])


class _Far(NamedTuple):
    """The heads that see far keys.

    Attributes:
        row: the sequence, with the queries of all heads.
        query: ``[k, 1, D]`` of the representatives, scaled.
        tables: of the sequence.
        far: of these heads.
        offset: ``[H]``, added to the log-sum-exp of far keys; None for zeros.
        window: ``[n, window]`` scores of own rows.
        sink: ``[n, sinks]``, the same.
    """

    row: Row
    query: Tensor
    tables: _Tables
    far: RowTables
    offset: Tensor | None
    window: Tensor
    sink: Tensor

    def attend(self, places: _Places, out: Tensor) -> None:
        """By one softmax over all keys, into ``out [1, H', Dv]``."""
        rows = self._shared(self.row.key)
        far = rows.shape[1] - places.window
        first = len(places.at)
        if places.at == list(range(first)):
            sinks = rows[:, :first]
            self._shift(rows[:, first:far])
            self._put(sinks, self.sink)
        else:  # between padding
            sinks = rows[:, places.at]
            self._shift(rows[:, :far])
            self._put(sinks, self.sink)
            rows[:, places.at] = sinks
        self._put(rows[:, far:], self.window)
        probs = _probabilities(rows, self.row.valid).to(out.dtype)
        weighted_values(probs[:, None], self.row.value, self.far, out)

    def merge(self, membership: Membership, places: _Places, out: Tensor) -> None:
        """The same, with torch's fused attention of far keys; for sequences without padding."""
        key, value, sinks = self.row.key, self.row.value, len(places.at)
        size = key.shape[1]
        local = (slice(0, sinks), slice(size - places.window, size))
        far = slice(sinks, size - places.window)
        leaders = self.row.query.index_select(0, self.tables.leaders)
        share, lse = fused.torch_clustered_attention(
            leaders[None],
            DenseKV(key[None, :, far], value[None, :, far]),
            AttentionCall(membership, self.row.scale, return_lse=True),
        )
        assert lse is not None
        weight = by_row(lse[0], self.far)  # [H', 1]
        self._shift(weight)
        own = (self.sink, self.window)
        columns = [weight]
        for part, scores in zip(local, own, strict=True):
            rows = self._shared(key[:, part])
            self._put(rows, scores)
            columns.append(rows)
        probs = torch.softmax(torch.cat(columns, 1), -1).to(out.dtype)
        parts = probs.split([1, sinks, places.window], 1)
        weighted_values(parts[2][:, None].contiguous(), value[:, local[1]], self.far, out)
        if sinks:
            first = torch.empty_like(out)
            weighted_values(parts[1][:, None].contiguous(), value[:, local[0]], self.far, first)
            out += first
        order = self.far.row_of_head
        own_weight = parts[0] if order is None else parts[0].index_select(0, order)
        out.addcmul_(own_weight, share[0])

    def _shared(self, key: Tensor) -> Tensor:
        """``[H', S]``: scores of each head's representative for some keys, in the order of V."""
        scores = decode_scores(self.row._replace(key=key), self.far, self.query)[:, 0]
        return by_row(_capped(scores, self.row.softcap), self.far)

    def _shift(self, rows: Tensor) -> None:
        """Add each head's offset to its scores of far keys."""
        if self.offset is not None:
            rows += self.offset[self.tables.row_heads, None]

    def _put(self, rows: Tensor, scores: Tensor) -> None:
        """Write own scores ``[n, columns]`` over those of representatives."""
        if not len(self.tables.followers) or not rows.shape[1]:
            return
        own = self.tables.own_of_followers
        picked = scores if own is None else scores.index_select(0, own)
        rows.index_copy_(0, self.tables.followers, picked)


class _Places(NamedTuple):
    """Where one sequence's local keys stand.

    Attributes:
        window: tokens of the exact window that there are.
        parts: they in the ring, in their order.
        sinks: places of the sinks outside the window.
        at: their positions.
    """

    window: int
    parts: tuple[slice, ...]
    sinks: list[int]
    at: list[int]

    @classmethod
    def of(cls, local: RollingBuffer, index: int, size: int) -> _Places:
        """Of a sequence of ``size`` tokens."""
        window = min(local.recent, size)
        parts: tuple[slice, ...] = ()
        if local.ring.shape[1]:
            first = (size - window + local.shift) % local.size
            behind = first + window - local.size  # of the window, at the start of the ring
            parts = (slice(first, first + window),)
            if behind > 0:
                parts = slice(first, local.size), slice(0, behind)
        # those inside the window are in the ring, too
        positions = local.sink_positions[index].tolist()
        sinks = [place for place, at in enumerate(positions) if 0 <= at < size - window]
        return cls(window, parts, sinks, [positions[place] for place in sinks])


def _own_scores(
    row: Row, query: Tensor, tables: _Tables, local: RollingBuffer, index: int, places: _Places
) -> tuple[Tensor, Tensor]:
    """Scores of own rows: ``[n, window]`` of the last tokens and ``[n, sinks]`` of the first."""
    size, work = row.key.shape[1], query.dtype
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    if tables.kept is not None:
        columns = query.index_select(0, tables.kept).view(row.key.shape[0], -1, query.shape[2]).mT
        for states, scores in zip(
            (row.key[:, size - places.window :], row.key[:, places.at]), found, strict=True
        ):
            scores.append(torch.bmm(widened(states, work), columns).mT.flatten(0, 1))
    if len(tables.removed):
        ring, sinks = local.ring[index], local.sinks[index]
        columns = query.index_select(0, tables.removed).view(ring.shape[0], -1, query.shape[2]).mT
        held = torch.bmm(widened(ring, work), columns).mT.flatten(0, 1)
        found[0].append(_joined([held[:, part] for part in places.parts], 1))
        held = torch.bmm(widened(sinks, work), columns).mT.flatten(0, 1)
        found[1].append(held if held.shape[1] == len(places.sinks) else held[:, places.sinks])
    if not found[0]:
        nothing = query.new_empty(0, 0)
        return nothing, nothing
    window, sink = (_joined(parts, 0) for parts in found)
    return _capped(window, row.softcap), _capped(sink, row.softcap)


def _ring_values(probs: Tensor, local: RollingBuffer, index: int, places: _Places) -> Tensor:
    """``[m, Dv]``: probabilities ``[m, window + sinks]`` of streaming heads times their V."""
    assert local.value_ring is not None
    assert local.value_sinks is not None
    ring, sinks = local.value_ring[index], local.value_sinks[index]
    rows = probs.view(ring.shape[0], -1, probs.shape[1])
    out, done = None, 0
    parts = [ring[:, part] for part in places.parts]
    if places.sinks:
        parts.append(sinks if sinks.shape[1] == len(places.sinks) else sinks[:, places.sinks])
    for values in parts:
        share = torch.bmm(rows[:, :, done : done + values.shape[1]], values)
        out, done = share if out is None else out + share, done + values.shape[1]
    assert out is not None
    return out.flatten(0, 1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _probabilities(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax of ``[n, S]``; zeros for a query that sees no key."""
    if valid is None:
        return torch.softmax(scores, -1)
    return torch.softmax(scores.masked_fill_(~valid, -torch.inf), -1).nan_to_num_(0.0)
