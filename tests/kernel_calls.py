"""Every attention kernel called on random sequences; what no token fills is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import Probe, windowed
from chai_attention.ops.near import NearKeys
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.ring import NearRing
from near_cases import near_pages
from op_calls import kernels
from paged_caches import PagedCaches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Config:
    """What kernels are compiled for."""

    kind: str
    heads: int
    kv_heads: int
    clusters: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    softcap: float | None
    padded: bool  # padding at the left of dense sequences
    spare: bool  # unused capacity, so that sequences differ in length
    page: int
    recent: int
    sinks: int
    probe_end: int
    streaming: int = 0
    near_page: int = 16

    def __str__(self) -> str:
        sizes = f"{self.heads}/{self.kv_heads}/{self.clusters} heads, {self.streaming} streaming, "
        sizes += f"{self.dim}/{self.value_dim}"
        flags = [name for name in ("softcap", "padded", "spare") if getattr(self, name)]
        return ", ".join([self.kind, sizes, str(self.dtype).removeprefix("torch."), *flags])


@dataclass
class Sequence:
    """Q of all heads ``[H, Q, D]``, K ``[G, S, D]``, V ``[G, S, Dv]``, and how much is padding."""

    query: Tensor
    key: Tensor
    value: Tensor
    first: int = 0

    @property
    def valid(self) -> Tensor:
        return torch.arange(self.key.shape[1], device=DEVICE) >= self.first


def offsets_of(config: Config, member: Membership) -> tuple[Tensor, Tensor] | None:
    """``[H, H]`` of an exact recent window, and each head's."""
    if not config.recent:
        return None
    generator = torch.Generator().manual_seed(config.heads)
    table = torch.randn(config.heads, config.heads, generator=generator).to(DEVICE)
    return table, windowed.head_offsets(table, member)


def _stack(parts: list[Tensor], size: int, token_major: bool = False) -> Tensor:
    """``[heads, S, D]`` of each sequence to ``[B, heads, size, D]``."""
    heads, _, dim = parts[0].shape
    shape = (len(parts), size, heads, dim) if token_major else (len(parts), heads, size, dim)
    room = torch.full(shape, torch.nan, dtype=parts[0].dtype, device=DEVICE)
    room = room.transpose(1, 2) if token_major else room
    for row, part in enumerate(parts):
        room[row, :, : part.shape[1]] = part
    return room


def _stored(member: Membership, sequences: list[Sequence]) -> tuple[list[Tensor], list[Tensor]]:
    """K and V of each sequence in the cache's order."""
    keys = [one.key[heads] for one, heads in zip(sequences, member.key_heads, strict=True)]
    values = [one.value[heads] for one, heads in zip(sequences, member.value_heads, strict=True)]
    return keys, values


def _lengths(sequences: list[Sequence]) -> Tensor:
    sizes = [one.key.shape[1] for one in sequences]
    return torch.tensor(sizes, dtype=torch.int32, device=DEVICE)


def _valid(config: Config, sequences: list[Sequence], size: int) -> Tensor | None:
    if not config.padded:
        return None
    valid = torch.ones(len(sequences), size, dtype=torch.bool, device=DEVICE)
    for row, one in enumerate(sequences):
        valid[row, : one.first] = False
    return valid


def _dense(config, member, sequences, scale):
    keys, values = _stored(member, sequences)
    size = max(k.shape[1] for k in keys) + (3 if config.spare else 0)
    query = torch.stack([one.query[h] for one, h in zip(sequences, member.slot_heads, strict=True)])
    out, lse = kernels.attention(
        query, _stack(keys, size), _stack(values, size, token_major=True), member, scale=scale,
        lengths=_lengths(sequences) if config.spare else None,
        valid=_valid(config, sequences, size), softcap=config.softcap, return_lse=True,
    )  # fmt: skip
    return out, lse


def _near_of(config: Config, member: Membership, sequences: list[Sequence]) -> NearRing:
    """K and V of removed heads as a cache remembers them behind these tokens."""
    batch, room = len(sequences), config.recent + 2
    positions = torch.full((batch, config.sinks), -1, dtype=torch.int32, device=DEVICE)

    def memories(states: list[Tensor], heads: Tensor) -> tuple[Tensor, Tensor]:
        shape = (batch, heads.shape[1], room, states[0].shape[2])
        ring = torch.full(shape, torch.nan, dtype=config.dtype, device=DEVICE)
        sinks = ring.new_full((batch, heads.shape[1], config.sinks, shape[3]), torch.nan)
        for row, one in enumerate(sequences):
            held, size = states[row][heads[row]], states[row].shape[1]
            last = torch.arange(max(0, size - room), size, device=DEVICE)
            ring[row, :, last % room] = held[:, last]
            first = torch.arange(one.first, min(size, one.first + config.sinks), device=DEVICE)
            sinks[row, :, : len(first)] = held[:, first]
            positions[row, : len(first)] = first.int()
        return ring, sinks

    keys = memories([one.key for one in sequences], member.removed_key_heads)
    values = [one.value for one in sequences]
    streams = memories(values, member.removed_value_heads) if member.streaming else (None, None)
    return NearRing(*keys, positions, config.recent, 0, *streams)


def _near(config, member, sequences, scale):
    keys, values = _stored(member, sequences)
    size = max(k.shape[1] for k in keys) + 3
    out = kernels.decode_recent(
        torch.stack([one.query for one in sequences]), _stack(keys, size),
        _stack(values, size, token_major=True), member, _near_of(config, member, sequences),
        lengths=_lengths(sequences), scale=scale, offset=offsets_of(config, member)[1],
        valid=_valid(config, sequences, size), softcap=config.softcap,
    )  # fmt: skip
    return out, None


def _window(config, member, sequences, scale):
    """Prefill with an exact window: `windowed_attention`, by the kernels on any device."""
    query, key, value = (
        torch.stack([getattr(one, name) for one in sequences]) for name in ("query", "key", "value")
    )
    queries, size = query.shape[2], key.shape[2]
    valid = _valid(config, sequences, size)
    tables = windowed.window_tables(size, queries, config.recent, config.sinks, valid, query.device)
    real = torch.ones(len(sequences), size, dtype=torch.bool, device=DEVICE)
    real = real if valid is None else valid
    first = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : tables.sinks]
    band = slice(max(0, size - queries - config.recent + 1), size)

    def near_of(states: Tensor) -> Tensor:
        index = first[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return torch.cat([states.gather(2, index), states[:, :, band]], 2)

    keys, values = _stored(member, sequences)
    out = kernels.windowed(
        query, _stack(keys, size), _stack(values, size, token_major=True), member,
        NearKeys(near_of(key), near_of(value)), tables, scale=scale,
        offset=offsets_of(config, member)[1], softcap=config.softcap,
    )  # fmt: skip
    return out, None


def _pages(parts: list[Tensor], tables: Tensor, page: int) -> Tensor:
    """``[heads, S, D]`` of each sequence in its pages of ``[P, page, heads, D]``."""
    heads, _, dim = parts[0].shape
    count = int(tables.max()) + 2
    room = torch.full((count, page, heads, dim), torch.nan, dtype=parts[0].dtype, device=DEVICE)
    flat = room.flatten(0, 1)
    for part, table in zip(parts, tables.long(), strict=True):
        token = torch.arange(part.shape[1], device=DEVICE)
        flat[table[token // page] * page + token % page] = part.transpose(0, 1)
    return room


def _paged_caches(config, member, sequences):
    """K pages, V pages and the block table."""
    most = max(-(-one.key.shape[1] // config.page) for one in sequences) + 1
    order = torch.randperm(len(sequences) * most)
    tables = order.view(len(sequences), most).to(device=DEVICE, dtype=torch.int32)
    keys, values = (_pages(parts, tables, config.page) for parts in _stored(member, sequences))
    return keys, values, tables


def _near_pages_of(
    config: Config, member: Membership, sequences: list[Sequence], caches: tuple[Tensor, ...]
) -> NearPages:
    """Near pages beside the pages ``caches``."""
    states = ([getattr(one, name).cpu() for one in sequences] for name in ("key", "value"))
    counts = [one.query.shape[1] for one in sequences]
    far = PagedCaches(*caches, _lengths(sequences), *states)
    return near_pages(member, far, counts, config.near_page, config.recent, config.sinks)


def _paged(config, member, sequences, scale):
    caches = _paged_caches(config, member, sequences)
    near = _near_pages_of(config, member, sequences, caches) if config.recent else None
    offsets = offsets_of(config, member)
    out, lse = kernels.paged_decode(
        torch.stack([one.query[:, 0] for one in sequences]), *caches, member,
        lengths=_lengths(sequences), scale=scale, softcap=config.softcap, near=near,
        offset=None if offsets is None else offsets[1], return_lse=near is None,
    )  # fmt: skip
    return out[:, None], None if lse is None else lse[:, :, None]


def _packed(sequences: list[Sequence]) -> tuple[Tensor, Tensor, list[int]]:
    """Q of all heads ``[T, H, D]``, where each sequence starts, and the numbers of queries."""
    counts = [one.query.shape[1] for one in sequences]
    query = torch.cat([one.query.transpose(0, 1) for one in sequences])
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    return query, starts, counts


def _probe(config: Config, sequences: list[Sequence], query: Tensor) -> Probe | None:
    if not config.probe_end:
        return None
    news = (
        torch.cat([x[:, x.shape[1] - one.query.shape[1] :].transpose(0, 1) for one, x in rows])
        for rows in (
            [(one, one.key) for one in sequences],
            [(one, one.value) for one in sequences],
        )
    )
    return Probe(query, *news, config.probe_end)


def _split(out: Tensor, lse: Tensor, counts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    return list(out.split(counts)), [part.T for part in lse.split(counts)]


def _paged_prefill(config, member, sequences, scale):
    query, starts, counts = _packed(sequences)
    if not sum(counts):
        return [one.query.transpose(0, 1) for one in sequences], None
    out = query.new_full((sum(counts), config.heads, config.value_dim), torch.nan)
    _, lse = kernels.paged_prefill(
        query, *_paged_caches(config, member, sequences), member, out, query_starts=starts,
        lengths=_lengths(sequences), most_queries=max(counts), scale=scale,
        softcap=config.softcap, probe=_probe(config, sequences, query), return_lse=True,
    )  # fmt: skip
    return _split(out, lse, counts)


def _varlen(config, member, sequences, scale):
    query, starts, counts = _packed(sequences)
    if not sum(counts):
        return [one.query.transpose(0, 1) for one in sequences], None
    keys, values = (
        torch.cat([x.transpose(0, 1) for x in parts]) for parts in _stored(member, sequences)
    )
    out = query.new_full((sum(counts), config.heads, config.value_dim), torch.nan)
    _, lse = kernels.varlen_prefill(
        query, keys, values, member, out, query_starts=starts, most_queries=max(counts),
        scale=scale, softcap=config.softcap, probe=_probe(config, sequences, query),
        return_lse=True,
    )  # fmt: skip
    return _split(out, lse, counts)


def _paged_window(config, member, sequences, scale):
    query, starts, counts = _packed(sequences)
    if not sum(counts):
        return [one.query.transpose(0, 1) for one in sequences], None
    out = query.new_full((sum(counts), config.heads, config.value_dim), torch.nan)
    caches = _paged_caches(config, member, sequences)
    near = _near_pages_of(config, member, sequences, caches)
    kernels.paged_prefill(
        query, *caches, member, out, query_starts=starts, lengths=_lengths(sequences),
        most_queries=max(counts), scale=scale, softcap=config.softcap, near=near,
        offset=offsets_of(config, member)[1], probe=_probe(config, sequences, query),
    )  # fmt: skip
    return list(out.split(counts)), None


def _varlen_window(config, member, sequences, scale):
    query, starts, counts = _packed(sequences)
    if not sum(counts):
        return [one.query.transpose(0, 1) for one in sequences], None
    out = query.new_full((sum(counts), config.heads, config.value_dim), torch.nan)
    tail = query.new_full((3, 1, 1), torch.nan)
    key, value = (
        torch.cat([*(getattr(one, name).transpose(0, 1) for one in sequences), tail_of])
        for name, tail_of in (
            ("key", tail.expand(-1, config.kv_heads, config.dim)),
            ("value", tail.expand(-1, config.kv_heads, config.value_dim)),
        )
    )
    kernels.varlen_prefill(
        query, key, value, member, out, query_starts=starts, most_queries=max(counts),
        scale=scale, softcap=config.softcap, natural_order=True, recent=config.recent,
        sinks=config.sinks, offset=offsets_of(config, member)[1],
        probe=_probe(config, sequences, query),
    )  # fmt: skip
    return list(out.split(counts)), None


RUN = {
    "decode": _dense,
    "prefill": _dense,
    "near": _near,
    "window": _window,
    "paged": _paged,
    "paged near": _paged,
    "paged prefill": _paged_prefill,
    "varlen": _varlen,
    "paged window": _paged_window,
    "varlen window": _varlen_window,
}
