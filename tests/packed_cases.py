"""Packed sequences: fresh prompts and continued ones, and their definition head by head."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from chai_attention.membership import Membership
from helpers import definition
from paged_caches import PagedCaches, paged_caches


@dataclass
class Packed:
    """Queries of several sequences in one tensor, behind the last one NaN."""

    query: Tensor  # [T, H, D]
    key: Tensor  # [T, G, D] of the new tokens, natural order
    value: Tensor  # [T, G, Dv]
    starts: Tensor  # [B + 1] int32
    caches: PagedCaches


def packed_case(
    member: Membership,
    queries: list[int],
    contexts: list[int],
    page: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: str,
    one_buffer: bool = False,
    tail: int = 0,
    stored_dtype: torch.dtype | None = None,
) -> Packed:
    """Sequences of so many new tokens behind so many old ones; ``tail`` rows of padding.

    ``stored_dtype``: as ``stored`` of `paged_caches`.
    """
    lengths = [q + c for q, c in zip(queries, contexts, strict=True)]
    caches = paged_caches(
        member, lengths, page, dim, value_dim, dtype, device, one_buffer, stored_dtype
    )
    ends = torch.tensor(queries).cumsum(0).tolist()
    query = torch.randn(ends[-1], member.heads, dim).to(dtype)

    def new(states: list[Tensor], width: int) -> Tensor:
        rows = [x[:, c:].transpose(0, 1) for x, c in zip(states, contexts, strict=True)]
        return torch.cat([*rows, torch.full((tail, member.kv_heads, width), torch.nan)]).to(dtype)

    padding = torch.full((tail, member.heads, dim), torch.nan, dtype=dtype)
    return Packed(
        torch.cat([query, padding]).to(device),
        new(caches.full_keys, dim).to(device),
        new(caches.full_values, value_dim).to(device),
        torch.tensor([0, *ends], dtype=torch.int32, device=device),
        caches,
    )


def packed_definition(
    case: Packed,
    representatives: Tensor,
    scale: float,
    softcap: float | None = None,
    probe_end: int = 0,
) -> Tensor:
    """``[T, H, Dv]`` float64 without the padding; ``representatives [B, H]``."""
    starts, rows = case.starts.tolist(), []
    own = torch.arange(representatives.shape[1])[None]
    for b, (start, stop) in enumerate(pairwise(starts)):
        query = case.query[start:stop].transpose(0, 1)[None].cpu()
        key, value = case.caches.full_keys[b][None], case.caches.full_values[b][None]
        out = definition(query, key, value, representatives[b : b + 1], scale, None, softcap)[0]
        if key.shape[2] == stop - start and probe_end:
            exact = definition(query, key, value, own, scale, None, softcap)[0]
            out[:probe_end] = exact[:probe_end]
        rows.append(out)
    return torch.cat(rows)


def stored(case: Packed, member: Membership) -> tuple[Tensor, Tensor]:
    """New K ``[T, kept, D]`` and V ``[T, G, Dv]`` in the orders of each sequence's membership."""
    keys, values = [], []
    starts = case.starts.tolist()
    for b, (start, stop) in enumerate(pairwise(starts)):
        stop = stop if b + 2 < len(starts) else len(case.key)  # the padding goes with the last
        keys.append(case.key[start:stop, member.key_heads[b].to(case.key.device)])
        values.append(case.value[start:stop, member.value_heads[b].to(case.key.device)])
    return torch.cat(keys), torch.cat(values)
