"""Every attention kernel called on random sequences; what no token fills is NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import Probe, windowed
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.rolling_buffer import RollingBuffer
from local_cases import local_pages
from op_calls import dispatched, kernels
from paged_caches import PagedCaches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Config:
    """What kernels are compiled for, and how their tensors lie in memory."""

    kind: str
    heads: int
    kv_heads: int
    clusters: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    softcap: float | None = None
    padded: bool = False  # padding at the left of dense sequences
    spare: bool = False  # unused capacity, so that sequences differ in length
    page: int = 16
    recent: int = 0
    sinks: int = 0
    probe_end: int = 0
    streaming: int = 0
    local_page: int = 16
    token_major: bool = True  # V of dense sequences
    one_buffer: bool = False  # a page of K and V is one run of memory
    stored: torch.dtype | None = None  # what pages hold, if not ``dtype``
    representatives: bool = False  # pages get the queries of representatives alone
    tables: str = "each"  # sequences have a row each, "shared" one or "rows" of more than there are
    natural: bool = False  # K and V of packed prompts are of all heads, parts of one tensor with Q
    offsets: bool = True  # of an exact window
    ring_spare: int = 2  # tokens that a ring holds besides its window
    tail: int = 0  # packed queries behind the last sequence
    lse: bool = True  # of packed queries, asked for

    def __str__(self) -> str:
        sizes = f"{self.heads}/{self.kv_heads}/{self.clusters} heads, {self.streaming} streaming, "
        sizes += f"{self.dim}/{self.value_dim}"
        parts = [self.kind, sizes, str(self.dtype).removeprefix("torch.")]
        for field in fields(self)[7:]:
            value = getattr(self, field.name)
            if value != field.default and field.name != "streaming":
                parts.append(field.name if value is True else f"{field.name} {value}")
        return ", ".join(parts)


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


@dataclass
class Case:
    """A call: sequences, whose heads ``member [B]`` groups."""

    config: Config
    member: Membership
    sequences: list[Sequence]
    scale: float

    def __post_init__(self) -> None:
        batch = len(self.sequences)
        self.tables, self.ids = self.member, None
        if self.config.tables == "shared":
            self.tables = self.member.select(torch.zeros(1, dtype=torch.long, device=DEVICE))
        elif self.config.tables == "rows":  # the first one is nobody's
            index = torch.arange(-1, batch, device=DEVICE) % batch
            self.tables = self.member.select(index)
            self.ids = torch.arange(1, batch + 1, dtype=torch.int32, device=DEVICE)

    @property
    def offsets(self) -> tuple[Tensor | None, Tensor | None] | None:
        """``[H, H]`` of an exact recent window, and each head's."""
        if not self.config.recent:
            return None
        heads, table = self.config.heads, None
        if self.config.offsets:
            generator = torch.Generator().manual_seed(heads)
            table = torch.randn(heads, heads, generator=generator).to(DEVICE)
        return table, windowed.head_offsets(table, self.member)

    @property
    def stored(self) -> tuple[list[Tensor], list[Tensor]]:
        """K and V of each sequence in the cache's order."""
        keys, values = self.member.key_heads, self.member.value_heads
        return (
            [one.key[heads] for one, heads in zip(self.sequences, keys, strict=True)],
            [one.value[heads] for one, heads in zip(self.sequences, values, strict=True)],
        )

    @property
    def lengths(self) -> Tensor:
        sizes = [one.key.shape[1] for one in self.sequences]
        return torch.tensor(sizes, dtype=torch.int32, device=DEVICE)

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.config.softcap}

    def valid(self, size: int) -> Tensor | None:
        if not self.config.padded:
            return None
        valid = torch.ones(len(self.sequences), size, dtype=torch.bool, device=DEVICE)
        for row, one in enumerate(self.sequences):
            valid[row, : one.first] = False
        return valid

    def dense(self, size: int) -> tuple[Tensor, Tensor]:
        """K and V ``[B, heads, size, D]`` as a cache holds them."""
        keys, values = self.stored
        return _stack(keys, size), _stack(values, size, self.config.token_major)

    def strided(self, tokens: int) -> Tensor:
        """``[tokens, H, Dv]`` to write to, NaN, a part of a larger tensor."""
        shape = (tokens, self.config.heads + 1, self.config.value_dim)
        return torch.full(shape, torch.nan, dtype=self.config.dtype, device=DEVICE)[:, 1:]


def _stack(parts: list[Tensor], size: int, token_major: bool = False) -> Tensor:
    """``[heads, S, D]`` of each sequence to ``[B, heads, size, D]``."""
    heads, _, dim = parts[0].shape
    shape = (len(parts), size, heads, dim) if token_major else (len(parts), heads, size, dim)
    room = torch.full(shape, torch.nan, dtype=parts[0].dtype, device=DEVICE)
    room = room.transpose(1, 2) if token_major else room
    for row, part in enumerate(parts):
        room[row, :, : part.shape[1]] = part
    return room


def _dense(case):
    config, member, sequences = case.config, case.member, case.sequences
    size = max(one.key.shape[1] for one in sequences) + (3 if config.spare else 0)
    query = torch.stack([one.query[h] for one, h in zip(sequences, member.slot_heads, strict=True)])
    return kernels.attention(
        query, *case.dense(size), member, lengths=case.lengths if config.spare else None,
        valid=case.valid(size), return_lse=True, **case.options,
    )  # fmt: skip


def _local_of(case: Case) -> RollingBuffer:
    """K and V of removed heads as a cache remembers them behind these tokens."""
    config, member, sequences = case.config, case.member, case.sequences
    batch, room = len(sequences), config.recent + config.ring_spare
    first = torch.tensor([one.first for one in sequences], dtype=torch.int32)
    positions = first[:, None] + torch.arange(config.sinks, dtype=torch.int32)
    if config.ring_spare:  # of sinks that do not exist, no place or one behind the end
        positions[positions >= case.lengths[:, None].cpu()] = -1

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
        return ring, sinks

    keys = memories([one.key for one in sequences], member.removed_key_heads)
    values = [one.value for one in sequences]
    streams = memories(values, member.removed_value_heads) if member.streaming else (None, None)
    return RollingBuffer(*keys, positions.to(DEVICE), config.recent, 0, *streams)


def _local(case):
    run = dispatched if case.config.kind == "local op" else kernels
    size = max(one.key.shape[1] for one in case.sequences) + 3
    out = run.decode_recent(
        torch.stack([one.query for one in case.sequences]), *case.dense(size), case.member,
        _local_of(case), lengths=case.lengths, offset=case.offsets[1], valid=case.valid(size),
        **case.options,
    )  # fmt: skip
    return out, None


def _window(case):
    """Prefill with an exact window: `windowed_attention`, by the kernels on any device."""
    config, sequences = case.config, case.sequences
    query, key, value = (
        torch.stack([getattr(one, name) for one in sequences]) for name in ("query", "key", "value")
    )
    queries, size = query.shape[2], key.shape[2]
    valid = case.valid(size)
    tables = windowed.window_tables(size, queries, config.recent, config.sinks, valid, query.device)
    real = torch.ones(len(sequences), size, dtype=torch.bool, device=DEVICE)
    real = real if valid is None else valid
    first = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : tables.sinks]
    band = slice(max(0, size - queries - config.recent + 1), size)

    def local_of(states: Tensor) -> Tensor:
        index = first[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return torch.cat([states.gather(2, index), states[:, :, band]], 2)

    out = kernels.windowed(
        query, *case.dense(size), case.member, LocalKeys(local_of(key), local_of(value)), tables,
        offset=case.offsets[1], **case.options,
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


def _paged_caches(case):
    """K pages, V pages and the block table."""
    page, sequences = case.config.page, case.sequences
    most = max(-(-one.key.shape[1] // page) for one in sequences) + 1
    order = torch.randperm(len(sequences) * most)
    tables = order.view(len(sequences), most).to(device=DEVICE, dtype=torch.int32)
    pages = [_pages(parts, tables, page) for parts in case.stored]
    if case.config.stored is not None:
        pages = [x.to(case.config.stored) for x in pages]
    if case.config.one_buffer:
        line = torch.cat([x.flatten(1) for x in pages], 1)
        parts = line.split([x[0].numel() for x in pages], 1)
        pages = [part.view(x.shape) for part, x in zip(parts, pages, strict=True)]
    return *pages, tables


def _local_pages_of(case: Case, caches: tuple[Tensor, ...]) -> LocalPages:
    """Local pages beside the pages ``caches``."""
    config, sequences = case.config, case.sequences
    states = ([getattr(one, name).cpu() for one in sequences] for name in ("key", "value"))
    counts = [one.query.shape[1] for one in sequences]
    far = PagedCaches(*caches, case.lengths, *states)
    return local_pages(case.member, far, counts, config.local_page, config.recent, config.sinks)


def _paged(case):
    config, sequences = case.config, case.sequences
    caches = _paged_caches(case)
    local = _local_pages_of(case, caches) if config.recent else None
    query = torch.stack([one.query[:, 0] for one in sequences])
    if config.representatives:
        query = torch.stack([x[h] for x, h in zip(query, case.member.slot_heads, strict=True)])
    out, lse = kernels.paged_decode(
        query, *caches, case.tables, lengths=case.lengths, ids=case.ids, local=local,
        offset=None if local is None else case.offsets[1], return_lse=local is None,
        out=case.strided(len(sequences)),
        most_keys=None if config.tables == "each" else int(case.lengths.max()), **case.options,
    )  # fmt: skip
    return out[:, None], None if lse is None else lse[:, :, None]


def _packed(case: Case, run: Callable[..., Tensor | None]) -> tuple[list[Tensor], Any]:
    """Prefill of packed sequences by ``run(states, out, options)`` of Q, K and V of new tokens."""
    config, sequences = case.config, case.sequences
    counts = [one.query.shape[1] for one in sequences]
    total = sum(counts)
    if not total:
        return [one.query.transpose(0, 1) for one in sequences], None
    states = [torch.cat([one.query.transpose(0, 1) for one in sequences])]
    for name in ("key", "value"):
        parts = zip((getattr(one, name) for one in sequences), counts, strict=True)
        states.append(torch.cat([x[:, x.shape[1] - n :].transpose(0, 1) for x, n in parts]))
    states = [F.pad(x, (0, 0, 0, 0, 0, config.tail), value=torch.nan) for x in states]
    if config.natural and config.value_dim == config.dim:
        heads = [x.shape[1] for x in states]
        states = torch.cat(states, 1).split(heads, 1)
    out = case.strided(total + config.tail)
    options = {
        "query_starts": torch.tensor([0, *counts], device=DEVICE).cumsum(0).int(),
        "most_queries": max(counts), "ids": case.ids,
        "return_lse": config.lse and not config.recent,
        "probe": Probe(*states, config.probe_end) if config.probe_end else None, **case.options,
    }  # fmt: skip
    lse = run(states, out, options)
    assert out[total:].isnan().all()
    split = None if lse is None else [part.T for part in lse[:total].split(counts)]
    return list(out[:total].split(counts)), split


def _paged_prefill(case):
    def run(states, out, options):
        query, caches = states[0], _paged_caches(case)
        if case.config.representatives:
            line = torch.arange(len(case.sequences), device=DEVICE)
            line = line.repeat_interleave(options["query_starts"].diff())
            slots = case.member.slot_heads[F.pad(line, (0, case.config.tail))]
            query = query.gather(1, slots[:, :, None].expand(-1, -1, query.shape[2]))
        if case.config.recent:
            options |= {"local": _local_pages_of(case, caches), "offset": case.offsets[1]}
        return kernels.paged_prefill(
            query, *caches, case.tables, out, lengths=case.lengths, **options
        )[1]

    return _packed(case, run)


def _varlen(case):
    def run(states, out, options):
        config, (query, key, value) = case.config, states
        if config.recent:
            options |= {
                "recent": config.recent, "sinks": config.sinks, "offset": case.offsets[1],
            }  # fmt: skip
        natural = config.natural or bool(config.recent)
        if not natural:
            key, value = (
                F.pad(
                    torch.cat([x.transpose(0, 1) for x in parts]),
                    (0, 0, 0, 0, 0, config.tail), value=torch.nan,
                )
                for parts in case.stored
            )  # fmt: skip
        return kernels.varlen_prefill(
            query, key, value, case.tables, out, natural_order=natural, **options
        )[1]

    return _packed(case, run)


RUN = {
    "decode": _dense,
    "prefill": _dense,
    "local": _local,
    "local op": _local,
    "window": _window,
    "paged": _paged,
    "paged local": _paged,
    "paged prefill": _paged_prefill,
    "varlen": _varlen,
    "paged window": _paged_prefill,
    "varlen window": _varlen,
}
