"""Local pages of random sequences, with NaN and wild page numbers wherever nothing may be read."""

from itertools import pairwise

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.local_pages import LocalPages
from helpers import recent_definition
from packed_cases import Packed
from paged_caches import PagedCaches

WILD = 2**30  # stands for pages that nobody may look up


def local_pages(
    member: Membership,
    caches: PagedCaches,
    queries: list[int],
    page: int,
    recent: int,
    sinks: int,
    stored: torch.dtype | None = None,
) -> LocalPages:
    """Pages of ``page`` tokens for what new ``queries`` of these sequences see local.

    ``stored``: what pages hold; None for what the far ones do.
    """
    device, stored = caches.keys.device, stored or caches.keys.dtype
    sizes = [key.shape[1] for key in caches.full_keys]
    needed = [-(-size // page) for size in sizes]
    count = sum(needed) + 3
    order = torch.randperm(count)
    table = torch.full((len(sizes), max(needed) + 1), WILD, dtype=torch.int32)
    heads = (member.removed_key_heads, member.removed_value_heads)
    dims = (caches.keys.shape[-1], caches.values.shape[-1])
    rooms = [
        torch.full((count, page, kind.shape[1], dim), torch.nan, dtype=caches.full_keys[0].dtype)
        for kind, dim in zip(heads, dims, strict=True)
    ]
    for row, size in enumerate(sizes):
        band = max(0, size - queries[row] - recent + 1)
        for token in {*range(min(sinks, size)), *range(band, size)}:
            if table[row, token // page] == WILD:
                table[row, token // page], order = order[0], order[1:]
            at = table[row, token // page], token % page
            for room, kind, full in zip(
                rooms, heads, (caches.full_keys, caches.full_values), strict=True
            ):
                room[at] = full[row][kind[row].cpu(), token]
    key, value = (room.to(stored).to(device) for room in rooms)
    return LocalPages(key, value, table.to(device), recent, sinks)


def packed_recent_definition(
    case: Packed,
    member: Membership,
    scale: float,
    recent: int,
    sinks: int,
    offsets: Tensor | None = None,
    softcap: float | None = None,
    probe_end: int = 0,
) -> Tensor:
    """``[T, H, Dv]`` float64 of `recent_definition`; ``member`` of B rows, ``offsets [H, H]``."""
    rows, rep = [], member.representatives.cpu()
    own = torch.arange(member.heads)[None]
    for b, (start, stop) in enumerate(pairwise(case.starts.tolist())):
        query = case.query[start:stop].transpose(0, 1)[None].cpu()
        key, value = case.caches.full_keys[b][None], case.caches.full_values[b][None]
        out = recent_definition(
            query, key, value, rep[b : b + 1], scale, recent, sinks, offsets, None, softcap,
            member.streaming,
        )[0]  # fmt: skip
        if key.shape[2] == stop - start and probe_end:
            # the window's first tokens see everything with their own scores
            full = recent_definition(
                query, key, value, own, scale, max(1, stop - start), 0, None, None, softcap
            )[0]
            out[:probe_end] = full[:probe_end]
        rows.append(out)
    return torch.cat(rows)
