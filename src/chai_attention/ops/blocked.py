"""Clustered attention on the CPU, by matrix products in blocks: fewer scores take less time.

One block of scores and one softmax per cluster, then a product with the V of each member; neither K
nor the probabilities are ever copied per member head. Scores are computed in float32 whatever the
dtype, as fused attention does. K and V are read fastest as ``[B, heads, S, D]``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, DenseKV
from chai_attention.ops.scratch import shaped, widened

QUERY_BLOCK = 256  # rows of one score block in prefill: the block stays in the L2 cache
KEY_BLOCK = 512  # keys converted to float32 at a time in decode, for the same reason
DECODE_ROWS = 8  # up to this many queries, all scores are made before any V is read


@dataclass(frozen=True)
class Cluster:
    """One cluster of one row, as host integers.

    Attributes:
        slot: place of its query.
        key_place: place of its K in the K cache.
        columns: for each V head that its members read, the place in the V cache and the members.
    """

    slot: int
    key_place: int
    columns: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class RowTables:
    """What one row's membership comes to, ready for loops and for index operations.

    Attributes:
        clusters: in the order of their slots.
        slots_per_key: if the slots of every kept K head are consecutive and equally many, else 0.
        slot_of_row: ``[H]`` int64, slot of each head, heads in the order of the V cache; None if
            every row has the slot of its number.
        row_of_head: ``[H]`` int64, where each head is in that order; None if that is the natural.
    """

    clusters: tuple[Cluster, ...]
    slots_per_key: int
    slot_of_row: Tensor | None
    row_of_head: Tensor | None


@lru_cache(maxsize=4096)
def row_tables(representatives: tuple[int, ...], kv_heads: int, kept: int) -> RowTables:
    """Tables of one row; they serve all layers' calls of a request, so they are remembered."""
    one = Membership(torch.tensor([representatives]), len(set(representatives)), kv_heads, kept)
    slot, value_slot = one.slot[0].tolist(), one.value_slot[0].tolist()
    key_places = one.key_slot[0].tolist()
    clusters = []
    for place, key_place in enumerate(key_places):
        columns: dict[int, tuple[int, ...]] = {}
        for head in (h for h, s in enumerate(slot) if s == place):
            columns[value_slot[head]] = (*columns.get(value_slot[head], ()), head)
        clusters.append(Cluster(place, key_place, tuple(sorted(columns.items()))))
    each = len(key_places) // kept
    even = key_places == [place for place in range(kept) for _ in range(each)]
    heads = sorted(range(len(slot)), key=value_slot.__getitem__)
    rows = None if heads == list(range(len(slot))) else torch.tensor(heads).argsort()
    in_order = [slot[head] for head in heads]
    slots = None if in_order == list(range(len(slot))) else torch.tensor(in_order)
    return RowTables(tuple(clusters), each if even else 0, slots, rows)


def blocked_attention(
    query: Tensor, kv: DenseKV, call: AttentionCall, first: Early | None = None
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention; see `dispatch.attention`.

    ``first`` may attend to some kept K heads in another way: see `Early`.
    """
    batch, slots, queries, _ = query.shape
    membership, valid = call.membership, kv.valid
    sizes = [kv.key.shape[2]] * batch if kv.lengths is None else kv.lengths.tolist()
    shape = (batch, queries, membership.heads, kv.value.shape[3])
    out = torch.empty(shape, dtype=kv.value.dtype)
    lse = torch.empty(batch, slots, queries) if call.return_lse else None
    if valid is not None and bool(valid.all()):
        valid = None
    for row, (representatives, size) in enumerate(zip(membership.host_rows, sizes, strict=True)):
        tables = row_tables(representatives, membership.kv_heads, membership.kept_keys)
        work = Row(
            query[row],
            kv.key[row, :, :size],
            kv.value[row, :, :size],
            None if valid is None else valid[row, :size],
            call.scale,
            call.softcap,
        )
        row_lse = None if lse is None else lse[row]
        done = first(work, row, out[row], row_lse) if first is not None else ()
        left = [cluster for cluster in tables.clusters if cluster.key_place not in done]
        if len(left) == len(tables.clusters) and queries <= DECODE_ROWS:
            _decode(work, tables, out[row], row_lse)
        elif left:
            _prefill(work, left, out[row], row_lse)
    return out, lse


class Row(NamedTuple):
    """One sequence: query ``[k, Q, D]``, key ``[kept, S, D]``, value ``[G, S, Dv]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    scale: float
    softcap: float | None

    @property
    def scaled_query(self) -> Tensor:
        """Queries with the scale in them, in the dtype of scores."""
        return self.query.to(self.work_dtype) * self.scale

    @property
    def work_dtype(self) -> torch.dtype:
        """Of scores."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


# Called for each row with its number, its ``out [Q, H, Dv]`` and its ``lse [k, Q]``, both to be
# written to; returns the places of the K heads that it has attended to.
Early = Callable[[Row, int, Tensor, Tensor | None], Collection[int]]


def _prefill(row: Row, clusters: Sequence[Cluster], out: Tensor, lse: Tensor | None) -> None:
    """One cluster after the other, each in blocks of queries over the keys they can see.

    ``out [Q, H, Dv]`` and ``lse [k, Q]`` are written to.
    """
    queries, size = row.query.shape[1], row.key.shape[1]
    past, dtype, work = size - queries, row.value.dtype, row.work_dtype
    # fresh memory for every block would cost as much in page faults as the softmax
    block = min(QUERY_BLOCK, queries)
    score_room = torch.empty(block * size, dtype=work)
    prob_room = torch.empty_like(score_room)
    low_room = torch.empty(block * size if dtype != work else 0, dtype=dtype)
    query = row.scaled_query
    for cluster in clusters:
        slot = cluster.slot
        key = row.key[cluster.key_place].to(work)  # [S, D]
        for start, stop in _blocks(queries, QUERY_BLOCK):
            seen = past + stop  # keys the last query of the block sees
            rows = stop - start
            room = shaped(score_room, rows, seen)
            scores = torch.mm(query[slot, start:stop], key[:seen].T, out=room)
            probs = _softmax(row, scores, past + start, out=shaped(prob_room, rows, seen))
            if lse is not None:
                lse[slot, start:stop] = _log_sum_exp(row, scores, probs)
            if low_room.numel():
                probs = shaped(low_room, rows, seen).copy_(probs)
            for place, heads in cluster.columns:
                first, *others = (out[start:stop, head] for head in heads)
                torch.mm(probs, row.value[place, :seen], out=first)
                for same in others:
                    same.copy_(first)


def _decode(row: Row, tables: RowTables, out: Tensor, lse: Tensor | None) -> None:
    """Scores of all clusters first, reading each K once; then one pass over V."""
    queries, size = row.query.shape[1], row.key.shape[1]
    scores = decode_scores(row, tables)  # [k, Q, S]
    probs = _softmax(row, scores, size - queries)
    if lse is not None:
        lse.copy_(_log_sum_exp(row, scores, probs))
    rows = by_row(probs.to(row.value.dtype), tables)  # [H, Q, S]
    weighted_values(rows, row.value, tables, out)


def by_row(slots: Tensor, tables: RowTables) -> Tensor:
    """What each slot has, ``[k, ...]``, for each head in the order of the V cache: ``[H, ...]``."""
    return slots if tables.slot_of_row is None else slots.index_select(0, tables.slot_of_row)


def weighted_values(rows: Tensor, value: Tensor, tables: RowTables, out: Tensor) -> None:
    """Write ``rows [H, Q, S]`` of probabilities times ``value [G, S, Dv]`` to ``out [Q, H, Dv]``.

    ``rows`` are in the order of the V cache and of its dtype.
    """
    heads, queries, size = rows.shape
    # the rows of all query heads that read one V head side by side: it is read once for them
    result = torch.bmm(rows.view(value.shape[0], -1, size), value).view(heads, queries, -1)
    if tables.row_of_head is None:
        out.copy_(result.transpose(0, 1))
    else:
        torch.index_select(result.transpose(0, 1), 1, tables.row_of_head, out=out)


def decode_scores(row: Row, tables: RowTables, query: Tensor | None = None) -> Tensor:
    """``[k, Q, S]`` scores; each kept K head is read once for all slots that use it.

    ``query`` is the row's, scaled, if it is at hand.
    """
    query = row.scaled_query if query is None else query
    slots, queries, dim = query.shape
    kept, size, _ = row.key.shape
    if tables.slots_per_key:
        # K times Q: for few queries several times as fast as Q times K
        columns = query.reshape(kept, -1, dim).mT
        if row.key.dtype == row.work_dtype:
            scores = torch.bmm(row.key, columns)  # [kept, S, slots of one * Q]
        else:
            scores = torch.empty(kept, size, columns.shape[2], dtype=row.work_dtype)
            for start, stop in _blocks(size, KEY_BLOCK):
                block = widened(row.key[:, start:stop], row.work_dtype)
                scores[:, start:stop] = torch.bmm(block, columns)
        return scores.mT.reshape(slots, queries, size)
    scores = torch.empty(slots, queries, size, dtype=row.work_dtype)
    for place in range(kept):
        users = [cluster.slot for cluster in tables.clusters if cluster.key_place == place]
        if not users:
            continue
        columns = query[users].flatten(0, 1).T
        for start, stop in _blocks(size, KEY_BLOCK * kept):
            block = widened(row.key[place, start:stop], row.work_dtype)
            result = torch.mm(block, columns).T
            scores[users, :, start:stop] = result.view(len(users), queries, -1)
    return scores


def _softmax(row: Row, scores: Tensor, first: int, out: Tensor | None = None) -> Tensor:
    """Masked softmax of ``[..., q, S]`` scores whose first query stands at position ``first``."""
    if row.softcap is not None:
        scores.div_(row.softcap).tanh_().mul_(row.softcap)
    rows, size = scores.shape[-2:]
    if rows > 1:
        # only the last `rows` keys can lie ahead of a query of this block
        scores[..., first : first + rows] += _future(scores.dtype)[:rows, : size - first]
    if row.valid is not None:
        scores.masked_fill_(~row.valid[:size], -torch.inf)
    probs = torch.softmax(scores, dim=-1, out=out)
    # a padded query sees no key at all: its probabilities are 0 / 0
    return probs if row.valid is None and first >= 0 else probs.nan_to_num_(0.0)


def _log_sum_exp(row: Row, scores: Tensor, probs: Tensor) -> Tensor:
    """Log-sum-exp of masked scores ``[..., S]``, told from their softmax without an exponential."""
    # the largest probability is exp(largest score - log-sum-exp); of no key at all it is 0
    most = scores.amax(-1)
    lse = most - probs.amax(-1).log()
    return lse if row.valid is None else torch.where(most == -torch.inf, most, lse)


@cache
def _future(dtype: torch.dtype) -> Tensor:
    """``[QUERY_BLOCK, QUERY_BLOCK]`` bias that hides the keys after each query."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=dtype).triu(1)


def _blocks(size: int, block: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of consecutive blocks that cover ``size``."""
    for start in range(0, size, block):
        yield start, min(start + block, size)
