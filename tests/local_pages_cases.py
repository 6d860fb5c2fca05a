"""Sequences in far and local pages, written token by token or at once, with NaN everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.local_pages import LocalPages
from helpers import recent_definition

NOWHERE = 2**31 - 1  # a page's number that must not be used


@dataclass
class LocalCase:
    """Pages, and K ``[G, S, D]`` and V ``[G, S, Dv]`` of every sequence, as pages hold them."""

    pages: tuple[Tensor, Tensor]
    table: Tensor
    local: LocalPages
    lengths: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def shuffled_table(counts: list[int], spare: int = 2) -> tuple[Tensor, int]:
    """A block table of so many pages for each sequence, in disorder, and how many pages there are.

    What a sequence does not have is a page that nobody has.
    """
    total = sum(counts) + spare
    order = torch.randperm(total)
    table = torch.full((len(counts), max([1, *counts]) + 1), int(order[-1]), dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count], order = order[:count], order[count:]
    return table, total


def local_case(
    member: Membership,
    lengths: list[int],
    write: Callable[..., None],
    *,
    page: int,
    local_page: int,
    recent: int,
    sinks: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    stored: torch.dtype | None = None,
    ids: Tensor | None = None,
    steps: bool = False,
) -> LocalCase:
    """Write sequences of ``lengths`` with ``write``, whose tables are ``member``'s ``ids``.

    Local pages that lie wholly before the window, but for the sinks', are NaN afterwards and have
    no number in the block table. ``steps``: one token of each sequence at a time.
    """
    stored = stored or dtype
    kept, values = member.kept_keys, member.kept_values
    groups = member.kv_heads
    table, total = shuffled_table([-(-n // page) for n in lengths])
    local_table, local_total = shuffled_table([-(-n // local_page) for n in lengths])

    def room(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype).to(stored).to(device)

    pages = room(total, page, kept, dim), room(total, page, values, value_dim)
    local = LocalPages(
        room(local_total, local_page, groups - kept, dim),
        room(local_total, local_page, groups - values, value_dim),
        local_table, recent, sinks,
    )  # fmt: skip
    states = [
        [torch.randn(groups, n, size).to(stored).to(dtype) for n in lengths]
        for size in (dim, value_dim)
    ]
    tables = torch.arange(len(lengths)) if ids is None else ids
    if member.batch == 1 and ids is None:
        tables = torch.zeros(len(lengths), dtype=torch.long)
    tokens = [(row, t) for row, n in enumerate(lengths) for t in range(n)]
    rounds = [tokens]
    if steps:
        rounds = [[x for x in tokens if x[1] == t] for t in range(max(lengths))]
    for some in rounds:
        key, value = (
            torch.stack([full[row][:, t] for row, t in some]).to(device) for full in states
        )
        slot, local_slot = (
            torch.tensor([int(where[row, t // size]) * size + t % size for row, t in some])
            for where, size in ((table, page), (local_table, local_page))
        )
        write(
            key, value, *pages, slot.to(device), member,
            tables[[row for row, _ in some]].int().to(device), local,
            local_slot_mapping=local_slot.to(device),
        )  # fmt: skip
    for row, length in enumerate(lengths):
        for index in range(-(-length // local_page)):
            first, last = index * local_page, (index + 1) * local_page - 1
            if first >= sinks and last < length - recent:
                for held in (local.key, local.value):
                    held[local_table[row, index]] = torch.nan
                local_table[row, index] = NOWHERE
    local = LocalPages(local.key, local.value, local_table.to(device), recent, sinks)
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    return LocalCase(pages, table.to(device), local, sizes, *states)


def case_definition(
    case: LocalCase,
    query: Tensor,
    member: Membership,
    scale: float,
    offsets: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """``[B, H, Dv]`` by `helpers.recent_definition`; zeros for sequences without a token."""
    rows = []
    for row, (key, value) in enumerate(zip(case.keys, case.values, strict=True)):
        if not key.shape[1]:
            rows.append(torch.zeros(member.heads, value.shape[2], dtype=torch.float64))
            continue
        rows.append(
            recent_definition(
                query[row, None, :, None].cpu(), key[None], value[None],
                member.representatives[row, None].cpu(), scale, case.local.recent, case.local.sinks,
                offsets, softcap=softcap, streaming=member.streaming,
            )[0, 0]
        )  # fmt: skip
    return torch.stack(rows)
