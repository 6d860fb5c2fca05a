"""Clustered attention on the CPU: matrix products in blocks, whose cost follows the work left.

One block of scores and one softmax per cluster, then one product with the V of all its members;
neither K nor the probabilities are ever copied per member head. Scores are computed in float32
whatever the dtype, as fused attention does. V stored token-major (``[B, S, G, Dv]`` in memory)
makes the V of a cluster one matrix ``[S, members * Dv]`` without a copy. CPUs that multiply 16-bit
numbers do some of it, or all, by `fused`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import fused

QUERY_BLOCK = 256  # rows of one score block in prefill: the block stays in the L2 cache
KEY_BLOCK = 1024  # keys converted to float32 at a time in decode, for the same reason
DECODE_ROWS = fused.FEW  # up to this many queries, all scores are made before any V is read


@dataclass(frozen=True)
class _Cluster:
    """One cluster of one row, as host integers."""

    slot: int  # place of its query
    key_place: int  # place of its K in the K cache
    heads: tuple[int, ...]  # member heads
    columns: tuple[int, ...]  # distinct places in the V cache, ascending
    column_of_head: tuple[int, ...]  # index into `columns` for each member

    @property
    def run(self) -> slice | None:
        """The columns as a slice if they are consecutive, as they always are without groups."""
        first, last = self.columns[0], self.columns[-1] + 1
        return slice(first, last) if last - first == len(self.columns) else None


@dataclass(frozen=True)
class _Tables:
    """What one row's membership comes to, ready for loops and for index operations."""

    clusters: tuple[_Cluster, ...]
    slots_per_key: int  # if the slots of every kept K head are consecutive and equally many
    slot: Tensor  # [H], slot of each head
    value_slot: Tensor  # [H], place in the V cache of each head
    runs: tuple[fused.Run, ...]  # for `fused`


@lru_cache(maxsize=4096)
def _tables(representatives: tuple[int, ...], kv_heads: int, kept: int) -> _Tables:
    """Tables of one row; they serve all layers' calls of a request, so they are remembered."""
    one = Membership(torch.tensor([representatives]), len(set(representatives)), kv_heads, kept)
    slot, value_slot = one.slot[0].tolist(), one.value_slot[0].tolist()
    key_places = one.key_slot[0].tolist()
    clusters = []
    for place, key_place in enumerate(key_places):
        heads = tuple(h for h, s in enumerate(slot) if s == place)
        columns = tuple(sorted({value_slot[h] for h in heads}))
        where = tuple(columns.index(value_slot[h]) for h in heads)
        clusters.append(_Cluster(place, key_place, heads, columns, where))
    each = len(key_places) // kept
    even = key_places == [place for place in range(kept) for _ in range(each)]
    return _Tables(
        tuple(clusters), each if even else 0, one.slot[0], one.value_slot[0], fused.runs_of(one)
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    *,
    scale: float,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention; arguments and results as in `ops.reference.attention`."""
    batch, slots, queries, _ = query.shape
    sizes = [key.shape[2]] * batch if lengths is None else lengths.tolist()
    out = torch.empty(batch, queries, membership.heads, value.shape[3], dtype=value.dtype)
    lse = torch.empty(batch, slots, queries) if return_lse else None
    if valid is not None and bool(valid.all()):
        valid = None
    fuses = fused.can_run(query, key, value, softcap)
    for row, (representatives, size) in enumerate(zip(membership.host_rows, sizes, strict=True)):
        tables = _tables(representatives, membership.kv_heads, membership.kept_keys)
        work = _Row(
            query[row],
            key[row, :, :size],
            value[row, :, :size].transpose(0, 1),  # [S, G, Dv]
            None if valid is None else valid[row, :size],
            scale,
            softcap,
            out[row],
            None if lse is None else lse[row],
        )
        clusters: Sequence[_Cluster] = tables.clusters
        if fuses and tables.runs:
            runs = fused.worthwhile(tables.runs, queries, size)
            fused.attend(
                work.query, work.key, work.value, runs,
                scale=scale, valid=work.valid, out=work.out, lse=work.lse,
            )  # fmt: skip
            done = {place for run in runs for place in run.keys}
            clusters = [cluster for cluster in clusters if cluster.key_place not in done]
            if not clusters:
                continue
        if queries <= DECODE_ROWS:
            _decode(work, tables)
        else:
            _prefill(work, clusters)
    return out, lse


@dataclass(frozen=True)
class _Row:
    """One sequence: query ``[k, Q, D]``, key ``[kept, S, D]``, value ``[S, G, Dv]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    scale: float
    softcap: float | None
    out: Tensor  # [Q, H, Dv]
    lse: Tensor | None  # [k, Q]

    @property
    def work_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


def _prefill(row: _Row, clusters: Sequence[_Cluster]) -> None:
    """One cluster after the other, each in blocks of queries over the keys they can see."""
    queries, size = row.query.shape[1], row.key.shape[1]
    past, dtype = size - queries, row.value.dtype
    # fresh memory for every block would cost as much in page faults as the softmax
    block = min(QUERY_BLOCK, queries)
    score_room = torch.empty(block * size, dtype=row.work_dtype)
    prob_room = torch.empty_like(score_room)
    low_room = torch.empty(block * size if dtype != row.work_dtype else 0, dtype=dtype)
    for cluster in clusters:
        slot = cluster.slot
        query = row.query[slot].to(row.work_dtype)  # [Q, D]
        key = row.key[cluster.key_place].to(row.work_dtype)  # [S, D]
        values = _columns(row.value, cluster)  # [S, m * Dv]
        result_room = torch.empty(block, values.shape[1], dtype=dtype)
        for start, stop in _blocks(queries, QUERY_BLOCK):
            seen = past + stop  # keys the last query of the block sees
            rows = stop - start
            scores = torch.mm(query[start:stop], key[:seen].T, out=_room(score_room, rows, seen))
            probs = _softmax(
                row, scores, past + start, slot, start, out=_room(prob_room, rows, seen)
            )
            if low_room.numel():
                probs = _room(low_room, rows, seen).copy_(probs)
            result = torch.mm(probs, values[:seen], out=result_room[:rows])  # [q, m * Dv]
            _store(row, cluster, result, start, stop)


def _room(memory: Tensor, rows: int, columns: int) -> Tensor:
    """Use the first ``rows * columns`` numbers of ``memory`` as a matrix."""
    return memory[: rows * columns].view(rows, columns)


def _decode(row: _Row, tables: _Tables) -> None:
    """Scores of all clusters first, reading each K once; then one pass over V."""
    queries, size = row.query.shape[1], row.key.shape[1]
    scores = _decode_scores(row, tables)  # [k, Q, S]
    probs = _softmax(row, scores, size - queries, slice(None), 0).to(row.value.dtype)
    heads, groups = row.out.shape[1], row.value.shape[1]
    if len(tables.clusters) < heads == groups:
        parts = [
            _weighted_sum(probs[slot], _columns(row.value, cluster))
            for slot, cluster in enumerate(tables.clusters)
        ]
        ordered = torch.cat(parts, dim=1).view(queries, heads, -1)
        torch.index_select(ordered, 1, tables.value_slot, out=row.out)
        return
    # Grouped-query attention: each V head is read once for all its query heads, whose rows of
    # probabilities are put side by side; they are H / (G Dv) of the size of V.
    rows = probs if len(tables.clusters) == heads else probs[tables.slot]
    rows = rows.view(groups, heads // groups * queries, size)
    result = torch.bmm(rows, row.value.transpose(0, 1))  # [G, H / G * Q, Dv]
    row.out.copy_(result.view(heads, queries, -1).transpose(0, 1))


def _decode_scores(row: _Row, tables: _Tables) -> Tensor:
    """``[k, Q, S]`` scores; each kept K head is read once for all slots that use it."""
    slots, queries, dim = row.query.shape
    kept, size, _ = row.key.shape
    scores = torch.empty(slots, queries, size, dtype=row.work_dtype)
    query = row.query.to(row.work_dtype)
    # without a conversion there is nothing to gain from blocks
    block_size = size if row.key.dtype == row.work_dtype else KEY_BLOCK
    for start, stop in _blocks(size, block_size):
        block = row.key[:, start:stop].to(row.work_dtype)
        if tables.slots_per_key:
            together = query.reshape(kept, tables.slots_per_key * queries, dim)
            result = torch.bmm(together, block.mT)
            scores[:, :, start:stop] = result.view(slots, queries, stop - start)
            continue
        for place in range(kept):
            users = [slot for slot, c in enumerate(tables.clusters) if c.key_place == place]
            if users:
                scores[users, :, start:stop] = query[users] @ block[place].T
    return scores


def _softmax(
    row: _Row,
    scores: Tensor,
    first: int,
    slot: int | slice,
    start: int,
    out: Tensor | None = None,
) -> Tensor:
    """Masked softmax of ``[..., q, S]`` scores whose first query stands at position ``first``."""
    scores *= row.scale
    if row.softcap is not None:
        scores = torch.tanh(scores / row.softcap) * row.softcap
    rows, size = scores.shape[-2:]
    if rows > 1:
        # only the last `rows` keys can lie ahead of a query of this block
        scores[..., first : first + rows] += _future(scores.dtype)[:rows, : size - first]
    if row.valid is not None:
        scores.masked_fill_(~row.valid[:size], -torch.inf)
    if row.lse is not None:
        row.lse[slot, start : start + rows] = torch.logsumexp(scores, dim=-1)
    probs = torch.softmax(scores, dim=-1, out=out)
    # a padded query sees no key at all: its probabilities are 0 / 0
    return probs if row.valid is None and first >= 0 else probs.nan_to_num_(0.0)


@cache
def _future(dtype: torch.dtype) -> Tensor:
    """``[QUERY_BLOCK, QUERY_BLOCK]`` bias that hides the keys after each query."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=dtype).triu(1)


def _columns(value: Tensor, cluster: _Cluster) -> Tensor:
    """V of a cluster's members side by side, ``[S, m * Dv]``: a view where memory allows."""
    run = cluster.run
    picked = value[:, run] if run is not None else value[:, list(cluster.columns)]
    return picked.reshape(value.shape[0], -1)


def _weighted_sum(probs: Tensor, values: Tensor) -> Tensor:
    """``probs [q, S] @ values [S, n]`` for few rows, by the routine that streams V fastest."""
    if values.dtype in (torch.bfloat16, torch.float16):
        return F.linear(probs, values.T)
    # one product runs on one core for a single row: give each core a part of the sum
    parts = torch.get_num_threads()
    each = values.shape[0] // parts
    if parts == 1 or each < KEY_BLOCK // 4:
        return probs @ values
    even = each * parts
    split = probs[:, :even].unflatten(1, (parts, each)).transpose(0, 1)
    total = torch.bmm(split, values[:even].unflatten(0, (parts, each))).sum(0)
    return total if even == values.shape[0] else total + probs[:, even:] @ values[even:]


def _store(row: _Row, cluster: _Cluster, result: Tensor, start: int, stop: int) -> None:
    """Write ``[q, m * Dv]`` to the member heads of ``out [Q, H, Dv]``."""
    result = result.view(stop - start, len(cluster.columns), -1)
    # plain copies of one head at a time: index_copy_ took three times as long
    for head, column in zip(cluster.heads, cluster.column_of_head, strict=True):
        row.out[start:stop, head] = result[:, column]


def _blocks(size: int, block: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of consecutive blocks that cover ``size``."""
    for start in range(0, size, block):
        yield start, min(start + block, size)
