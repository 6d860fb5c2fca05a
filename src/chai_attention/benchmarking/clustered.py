"""Clustered attention as the runtimes call it: inputs, caches, and one call per layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chai_attention.benchmarking.cases import AttentionShape, Case
from chai_attention.integrations.transformers.buffers import pick_heads
from chai_attention.membership import Membership
from chai_attention.ops import (
    AttentionCall,
    DenseKV,
    PackedQueries,
    PagedKV,
    attention,
    decode_recent,
    paged_decode,
    paged_prefill,
    windowed,
    windowed_attention,
)
from chai_attention.ops.fp8 import as_stored, narrow, widen_pages
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.rolling_buffer import RollingBuffer

Attend = Callable[[], Tensor]


class Inputs(NamedTuple):
    """Q, K and V of all heads.

    Attributes:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``.
        value: ``[B, G, S, D]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.query.shape[-1] ** -0.5)


@dataclass(frozen=True)
class Layout:
    """How K and V lie in memory and what is exact.

    Attributes:
        page: tokens of a page; None for dense caches. Local pages hold what `local_page_of` says.
        recent: w, last keys that every head sees with its own scores; 0 for none.
        sinks: s, first keys that it does.
        narrow: whether pages hold 8-bit floats.
    """

    page: int | None = None
    recent: int = 0
    sinks: int = 0
    narrow: bool = False

    def __str__(self) -> str:
        parts = ["dense" if self.page is None else f"pages of {self.page}"]
        if self.narrow:
            parts.append("8-bit floats")
        if self.recent:
            parts.append(f"exact {self.recent}+{self.sinks}")
        return ", ".join(parts)


def random_inputs(case: Case, shape: AttentionShape, dtype: torch.dtype, device: str) -> Inputs:
    """Draw normally distributed Q, K and V."""
    kv = shape.kv_heads, case.tokens
    sizes = (shape.heads, case.queries), kv, kv
    return Inputs(
        *(
            torch.randn(case.batch, heads, tokens, shape.head_dim, device=device, dtype=dtype)
            for heads, tokens in sizes
        )
    )


def rounded_inputs(inputs: Inputs) -> Inputs:
    """K and V as they are read back from 8-bit pages."""
    return Inputs(inputs.query, as_stored(inputs.key), as_stored(inputs.value))


def even_membership(
    heads: int, clusters: int, batch: int, kv_heads: int | None = None
) -> Membership:
    """Clusters of equal size (give or take one) over shuffled heads, another for every sequence."""
    rows = []
    for _ in range(batch):
        row = torch.empty(heads, dtype=torch.long)
        for members in torch.randperm(heads).tensor_split(clusters):
            row[members] = members.min()
        rows.append(row)
    return Membership.from_representatives(torch.stack(rows), kv_heads=kv_heads)


def with_streaming(
    heads: int, clusters: int, batch: int, kv_heads: int, streaming: int
) -> Membership:
    """`even_membership` of the other heads beside ``streaming`` heads, whole K/V heads."""
    if not streaming:
        return even_membership(heads, clusters, batch, kv_heads)
    group = heads // kv_heads
    chosen = torch.randperm(kv_heads)[: streaming // group].tolist()
    streams = [head for head in range(heads) if head // group in chosen]
    left = heads - streaming
    far = even_membership(left, clusters, batch, left // group)
    made = Membership.with_streaming(far, heads, kv_heads, streams)
    return Membership.from_representatives(
        made.representatives, clusters, kv_heads, far.kept_keys, streams
    )


def clustered_call(inputs: Inputs, member: Membership, layout: Layout) -> Attend:
    """Store K and V as a cache would, and return the call that attends: ``[B, Q, H, D]``."""
    key = pick_heads(inputs.key, member.key_heads)
    value = pick_heads(inputs.value, member.value_heads)
    if value.is_cuda and not member.is_identity:  # as the cache keeps it, token by token
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    stored = Inputs(inputs.query, key, value)
    windowed_too = bool(layout.recent) and not member.is_identity
    decode = inputs.query.shape[2] == 1
    offset = windowed.head_offsets(None, member) if windowed_too else None
    asked = AttentionCall(member, inputs.scale, offset=offset)
    if layout.page is not None:
        local = local_pages(inputs, member, layout) if windowed_too else None
        return (_paged if decode else _paged_prefill)(stored, asked, layout, local)
    if windowed_too and decode:
        ring = rolling_buffer(inputs.key, inputs.value, member, layout)
        kv = DenseKV(key, value, _lengths(inputs))
        return partial(decode_recent, inputs.query, kv, ring, asked)
    if windowed_too:
        keys, tables = _local_keys(inputs, layout)
        return partial(windowed_attention, inputs.query, DenseKV(key, value), keys, tables, asked)
    query = pick_heads(inputs.query, member.slot_heads)

    def call() -> Tensor:
        return attention(query, key, value, member, scale=inputs.scale)[0]

    return call


def rolling_buffer(key: Tensor, value: Tensor, member: Membership, layout: Layout) -> RollingBuffer:
    """Return the memories of K, V ``[B, G, S, D]`` of removed heads behind S tokens."""
    batch, size = key.shape[0], key.shape[2]
    count = min(layout.sinks, size)

    def memories(states: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        removed = pick_heads(states, heads)
        ring = removed.new_zeros(*removed.shape[:2], layout.recent, removed.shape[3])
        last = torch.arange(max(0, size - layout.recent), size, device=key.device)
        ring[:, :, last % layout.recent] = removed[:, :, last]
        sinks = removed.new_zeros(*removed.shape[:2], layout.sinks, removed.shape[3])
        sinks[:, :, :count] = removed[:, :, :count]
        return ring, sinks

    positions = torch.arange(layout.sinks, device=key.device, dtype=torch.int32)
    positions = torch.where(positions < count, positions, -1).expand(batch, -1).contiguous()
    values = memories(value, member.removed_value_heads) if member.streaming else (None, None)
    return RollingBuffer(
        *memories(key, member.removed_key_heads), positions, layout.recent, 0, *values
    )


def _local_keys(inputs: Inputs, layout: Layout) -> tuple[LocalKeys, windowed.WindowTables]:
    """First and last K and V of all heads, and the tables of where they are."""
    queries, size = inputs.query.shape[2], inputs.key.shape[2]
    sinks = min(layout.sinks, size)
    first = max(0, size - queries - layout.recent + 1)
    local = LocalKeys(
        *(torch.cat([x[:, :, :sinks], x[:, :, first:]], 2) for x in (inputs.key, inputs.value))
    )
    return local, windowed.window_tables(
        size, queries, layout.recent, layout.sinks, None, inputs.query.device
    )


def local_page_of(page: int, member: Membership) -> int:
    """Tokens of a local page, which is to take no more memory than a far one of ``page`` tokens."""
    kept = member.kept_keys + member.kept_values
    removed = 2 * member.kv_heads - kept
    return max(16, page * kept // max(1, removed) // 16 * 16)


def local_pages(inputs: Inputs, member: Membership, layout: Layout) -> LocalPages:
    """Return pages with K and V of removed heads that the queries see local, and no others."""
    assert layout.page is not None
    batch, size, device = inputs.key.shape[0], inputs.key.shape[2], inputs.key.device
    page = local_page_of(layout.page, member)
    first = max(0, size - inputs.query.shape[2] - layout.recent + 1) // page  # of the band
    count = -(-size // page)
    used = [n for n in range(count) if n * page < layout.sinks or n >= first]
    token = torch.tensor(used, device=device)[:, None] * page + torch.arange(page, device=device)
    token = token.flatten()
    order = torch.randperm(batch * len(used), device=device).view(batch, len(used))
    table = torch.full((batch, count), -1, dtype=torch.int32, device=device)
    table[:, used] = order.int()
    key, value = (
        _in_pages(pick_heads(states[:, :, token[token < size]], heads), order, page)
        for states, heads in (
            (inputs.key, member.removed_key_heads),
            (inputs.value, member.removed_value_heads),
        )
    )
    if layout.narrow:
        key, value = narrow(key), narrow(value)
    return LocalPages(key, value, table, layout.recent, layout.sinks)


def _paged(
    stored: Inputs, asked: AttentionCall, layout: Layout, local: LocalPages | None
) -> Attend:
    kv = PagedKV(*_pages(stored, layout), _lengths(stored), local)
    query = stored.query[:, :, 0].contiguous()
    return lambda: paged_decode(query, kv, asked)[0][:, None]


def _paged_prefill(
    stored: Inputs, asked: AttentionCall, layout: Layout, local: LocalPages | None
) -> Attend:
    batch, heads, queries, dim = stored.query.shape
    kv = PagedKV(*_pages(stored, layout), _lengths(stored), local)
    packed = stored.query.transpose(1, 2).reshape(batch * queries, heads, dim)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=packed.device) * queries
    new = PackedQueries(packed, starts, queries)
    # prompts read copies of 8-bit pages, as in a server
    copied = _copied(kv, packed.dtype) if layout.narrow else lambda: kv
    return lambda: paged_prefill(new, copied(), asked)[0].view(batch, queries, heads, -1)


def _copied(kv: PagedKV, dtype: torch.dtype) -> Callable[[], PagedKV]:
    """Return a call that copies 8-bit pages to a wider dtype, local ones too."""
    fill, local = _copies(kv, dtype), kv.window
    if local is None:
        return lambda: replace(kv, **fill())
    fill_local = _copies(local, dtype)
    return lambda: replace(kv, window=replace(local, **fill_local()), **fill())


def _copies(pages: PagedKV | LocalPages, dtype: torch.dtype) -> Callable[[], dict[str, Any]]:
    """Make room for copies of the pages in use, and return the call that fills it."""
    is_used = pages.block_table >= 0
    used = pages.block_table[is_used].long()
    table = torch.full_like(pages.block_table, -1)
    table[is_used] = torch.arange(len(used), dtype=table.dtype, device=table.device)
    room = {
        name: torch.empty(len(used), *x.shape[1:], dtype=dtype, device=x.device)
        for name, x in (("key", pages.key), ("value", pages.value))
    }

    def fill() -> dict[str, Any]:
        for name, copies in room.items():
            widen_pages(getattr(pages, name), used, copies)
        return {**room, "block_table": table}

    return fill


def _pages(stored: Inputs, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """K pages, V pages and the block table, pages in random order."""
    assert layout.page is not None
    count = -(-stored.key.shape[2] // layout.page)
    batch, device = stored.key.shape[0], stored.key.device
    order = torch.randperm(batch * count, device=device).view(batch, count)
    keys, values = (_in_pages(x, order, layout.page) for x in (stored.key, stored.value))
    if layout.narrow:
        keys, values = narrow(keys), narrow(values)
    return keys, values, order.to(torch.int32)


def _in_pages(states: Tensor, order: Tensor, page: int) -> Tensor:
    """``[B, heads, S, D]`` to pages ``[P, page, heads, D]`` at the places ``order [B, P / B]``."""
    batch, heads, size, dim = states.shape
    count = order.shape[1]
    room = states.new_zeros(batch, count * page, heads, dim)
    room[:, :size] = states.transpose(1, 2)
    pages = torch.empty_like(room).view(batch * count, page, heads, dim)
    pages[order.flatten()] = room.view(batch * count, page, heads, dim)
    return pages


def _lengths(inputs: Inputs) -> Tensor:
    batch, size = inputs.key.shape[0], inputs.key.shape[2]
    return torch.full((batch,), size, dtype=torch.int32, device=inputs.key.device)
