"""Clustered attention by torch's fused attention, in few calls.

Every member computes its representative's scores again, from K that is then in the CPU's cache.
That is faster where torch's kernel runs at the speed of memory (`choice` measures it). A call takes
consecutive clusters of equal size; K is expanded over their members without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import blocked
from chai_attention.ops.call import AttentionCall, DenseKV

FEW = blocked.DECODE_ROWS  # queries, up to which those of all heads of one V head go together
MEMBERS = 4  # in prefill, of more V heads the scores are better computed once, in float32
SHORT = 128  # keys, up to which they never are
_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive kept K heads with equally many consecutive V heads each.

    Attributes:
        keys: their places in the K cache.
        values: places in the V cache of their V heads.
        slots: of the query heads of these V heads, in their order.
        heads: the same heads.
    """

    keys: range
    values: range
    slots: tuple[int, ...]
    heads: tuple[int, ...]

    def queries(self, query: Tensor) -> Tensor:
        """``[count, each, group, Q, D]`` of ``query [k, Q, D]``, without a copy where it can be."""
        if self.group > 1:
            return query[list(self.slots)].unflatten(0, (self.count, self.each, self.group))
        # without groups every K has one slot, in the same order
        first = self.slots[0]
        rows = query[first : first + self.count, None, None]
        return rows.expand(-1, self.each, -1, -1, -1)

    @property
    def count(self) -> int:
        """K heads."""
        return len(self.keys)

    @property
    def each(self) -> int:
        """V heads of each."""
        return len(self.values) // self.count

    @property
    def group(self) -> int:
        """Query heads of each V head."""
        return len(self.heads) // (self.count * self.each)


@lru_cache(maxsize=4096)
def _runs(representatives: tuple[int, ...], kv_heads: int, kept: int) -> tuple[Run, ...]:
    clusters = len(set(representatives))
    return runs_of(Membership(torch.tensor([representatives]), clusters, kv_heads, kept))


def torch_clustered_attention(
    query: Tensor, kv: DenseKV, call: AttentionCall
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention; see `dispatch.attention`.

    What torch's kernel does not take, and what it is not made for, is done by `blocked`.
    """
    membership = call.membership
    if not can_run(query, kv, call.softcap):
        return blocked.blocked_attention(query, kv, call)

    def some(row: blocked.Row, index: int, out: Tensor, lse: Tensor | None) -> frozenset[int]:
        heads = membership.host_rows[index]
        runs = _runs(heads, membership.kv_heads, membership.kept_keys)
        runs = worthwhile(runs, row.query.shape[1], row.key.shape[1])
        attend(row, runs, out, lse)
        return frozenset(place for run in runs for place in run.keys)

    return blocked.blocked_attention(query, kv, call, first=some)


def can_run(query: Tensor, kv: DenseKV, softcap: float | None) -> bool:
    """Whether torch's kernel takes such tensors."""
    return (
        query.device.type == "cpu"
        and _flash is not None
        and softcap is None
        and query.shape[-1] == kv.value.shape[-1]
        # torch's own checks are not passed on the way to its kernel
        and all(x.numel() and x.stride(-1) == 1 for x in (query, kv.key, kv.value))
    )


def runs_of(membership: Membership) -> tuple[Run, ...]:
    """Runs of a membership of one row.

    None at all where heads of one V head follow representatives with different K, as may be with
    grouped queries.
    """
    slot, place = membership.slot[0].tolist(), membership.value_slot[0].tolist()
    key_of_slot = membership.key_slot[0].tolist()
    heads_of = [[h for h, p in enumerate(place) if p == v] for v in range(membership.kv_heads)]
    keys_of = [{key_of_slot[slot[h]] for h in heads} for heads in heads_of]
    if any(len(keys) != 1 for keys in keys_of):
        return ()
    clusters = []  # K place, first V place, number of V heads
    for key, places in groupby(range(len(keys_of)), lambda v: next(iter(keys_of[v]))):
        first, *others = places
        clusters.append((key, first, 1 + len(others)))
    found, first = [], 0
    for at in range(1, len(clusters) + 1):
        key, value, each = clusters[first]
        if at < len(clusters) and clusters[at][0] == key + at - first and clusters[at][2] == each:
            continue
        values = range(value, value + (at - first) * each)
        heads = tuple(head for v in values for head in heads_of[v])
        slots = tuple(slot[head] for head in heads)
        found.append(Run(range(key, key + at - first), values, slots, heads))
        first = at
    return tuple(found)


def worthwhile(runs: Sequence[Run], queries: int, size: int) -> tuple[Run, ...]:
    """Those that `attend` can do faster than `blocked`: of few queries all."""
    return tuple(run for run in runs if queries <= FEW or run.each <= MEMBERS or size <= SHORT)


def attend(row: blocked.Row, runs: Sequence[Run], out: Tensor, lse: Tensor | None) -> None:
    """Causal attention of some clusters of one sequence, without a softcap.

    Args:
        row: the sequence.
        runs: the clusters.
        out: ``[Q, H, D]``, written to.
        lse: ``[k, Q]`` float32, written to; None if nobody asks.
    """
    if not runs:
        return
    query, key, value, valid = row.query, row.key, row.value, row.valid
    queries, size, dim = query.shape[1], key.shape[1], key.shape[2]
    group, few = runs[0].group, queries <= FEW
    is_causal = valid is None and 1 < queries == size and not (few and group > 1)
    mask = None if is_causal else _mask(queries, size, valid, query.dtype)
    blind = None  # [Q], padded queries, which see no key at all
    if mask is not None and valid is not None:
        blind = mask[0, 0].amax(-1) == -torch.inf
    if mask is not None and few and group > 1:
        mask = mask.repeat(1, 1, group, 1)
    for run in runs:
        q = run.queries(query)  # [count, each, group, Q, D]
        k = key[run.keys.start : run.keys.stop]
        v = value[run.values.start : run.values.stop]
        if few or group == 1:
            # query heads that read the same V are as many more queries of one head
            q = q.flatten(2, 3)
            k = k[:, None].expand(-1, run.each, -1, -1)
            v = v.unflatten(0, (run.count, run.each))
        else:
            q = q.flatten(0, 1)
            k = k.repeat_interleave(run.each, 0)[:, None].expand(-1, group, -1, -1)
            v = v[:, None].expand(-1, group, -1, -1)
        part, part_lse = _flash(q, k, v, is_causal=is_causal, attn_mask=mask, scale=row.scale)
        part = part.reshape(-1, queries, dim)
        if few:
            out[:, list(run.heads)] = part.transpose(0, 1)
        else:  # as in `blocked`, copies of one head at a time are faster
            for head, states in zip(run.heads, part, strict=True):
                out[:, head] = states
        if lse is not None:
            lse[list(run.slots)] = part_lse.reshape(-1, queries)
    if blind is not None and bool(blind.any()):
        for run in runs:
            out[blind.nonzero(), list(run.heads)] = 0.0
            if lse is not None:
                lse[list(run.slots)] = lse[list(run.slots)].masked_fill(blind, -torch.inf)


def _mask(queries: int, size: int, valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``[1, 1, Q, S]`` to add to the scores; None for queries that see all keys."""
    if queries == 1 and valid is None:
        return None
    seen = torch.ones(queries, size, dtype=torch.bool).tril(size - queries)
    if valid is not None:
        seen &= valid
    return torch.zeros(queries, size, dtype=dtype).masked_fill_(~seen, -torch.inf)[None, None]
