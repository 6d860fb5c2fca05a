"""Paged caches of random sequences, with NaN wherever no token stands."""

from dataclasses import dataclass

import torch
from torch import Tensor

from chai_attention.membership import Membership


@dataclass
class PagedCaches:
    """Pages and, for the independent computation, K and V of all heads of every sequence."""

    keys: Tensor  # [P, N, kept, D]
    values: Tensor  # [P, N, kept values, Dv]
    table: Tensor  # [B, max_pages] int32
    lengths: Tensor  # [B] int32
    full_keys: list[Tensor]  # [G, S, D] each
    full_values: list[Tensor]  # [G, S, Dv] each


def paged_caches(
    member: Membership,
    lengths: list[int],
    page: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: str,
    one_buffer: bool = False,
    stored: torch.dtype | None = None,
) -> PagedCaches:
    """Sequences of ``lengths`` in pages out of order.

    ``one_buffer``: a page is a run of memory. ``stored``: what pages hold, ``dtype`` or a narrower
    one, to which K and V are then rounded.
    """
    stored = stored or dtype
    kept, groups = member.kept_keys, member.kv_heads
    kept_values = member.kept_values
    needed = [-(-length // page) for length in lengths]
    count = sum(needed) + 3
    keys = torch.full((count, page, kept, dim), torch.nan, dtype=dtype)
    values = torch.full((count, page, kept_values, value_dim), torch.nan, dtype=dtype)
    order = torch.randperm(count)
    table = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
    full_keys, full_values = [], []
    for row, length in enumerate(lengths):
        key = torch.randn(groups, length, dim).to(stored).to(dtype)
        value = torch.randn(groups, length, value_dim).to(stored).to(dtype)
        pages, order = order[: needed[row]], order[needed[row] :]
        table[row, : needed[row]] = pages
        for token in range(length):
            at = pages[token // page], token % page
            keys[at] = key[member.key_heads[row], token]
            values[at] = value[member.value_heads[row], token]
        full_keys.append(key)
        full_values.append(value)
    keys, values = keys.to(stored), values.to(stored)
    if one_buffer:
        line = torch.cat([keys.flatten(1), values.flatten(1)], 1).to(device)
        keys = line[:, : page * kept * dim].view(count, page, kept, dim)
        values = line[:, page * kept * dim :].view(count, page, kept_values, value_dim)
    return PagedCaches(
        keys.to(device), values.to(device), table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device), full_keys, full_values,
    )  # fmt: skip
