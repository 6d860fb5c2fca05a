"""Prefill of packed sequences one by one, as the CPU does it: what kernels are tested against.

`paged_prefill` says what its two functions take and calls this where there is no kernel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import reference, windowed
from chai_attention.ops.near import NearKeys
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.paged import gather_pages, hide_spare, rows_of

if TYPE_CHECKING:
    from chai_attention.ops.paged_prefill import Probe


class Window(NamedTuple):
    """The exact window of one step.

    Attributes:
        recent: w.
        sinks: s.
        offset: ``[B, H]`` float32 added to the far keys' log-sum-exp; None for zeros.
        near: K and V of the near keys of each sequence, see `near.NearKeys`.
    """

    recent: int
    sinks: int
    offset: Tensor | None
    near: list[NearKeys]


States = tuple[Tensor, Tensor]  # K ``[kept_keys, S, D]`` and V ``[kept_values, S, Dv]``


def paged_states(
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: list[int],
    dtype: torch.dtype,
) -> list[States]:
    """K and V of each sequence out of its pages."""
    sizes = torch.tensor(lengths, device=block_table.device)
    keys, values = (
        hide_spare(gather_pages(x, block_table, dtype), sizes) for x in (key_pages, value_pages)
    )
    return [(k[:, :n], v[:, :n]) for k, v, n in zip(keys, values, lengths, strict=True)]


def paged_near(
    pages: NearPages, states: list[States], members: Membership, queries: list[int]
) -> list[NearKeys]:
    """The near keys of each sequence: kept heads' out of ``states``, the others' of near pages."""
    near = []
    for b, (key, value) in enumerate(states):
        size, page = key.shape[1], pages.key.shape[1]
        band = max(0, size - queries[b] - pages.recent + 1)
        seen = torch.tensor([*range(min(pages.sinks, size)), *range(band, size)], dtype=torch.long)
        # pages that lie before the window and behind the sinks are not looked up
        at = pages.block_table[b, seen // page].long(), seen % page
        near.append(
            NearKeys(
                torch.cat([key[:, seen], _own(pages.key, at, key)])[members.key_place[b]][None],
                torch.cat([value[:, seen], _own(pages.value, at, value)])[members.value_place[b]][
                    None
                ],
            )
        )
    return near


def _own(pages: Tensor, at: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """``[removed heads, tokens, D]`` out of near pages."""
    return pages[at].transpose(0, 1).to(like.dtype)


def packed_states(
    key: Tensor, value: Tensor, starts: list[int], members: Membership | None
) -> list[States]:
    """K and V of each prompt out of ``[T, heads, D]``, of all heads if there are ``members``."""
    states = []
    for b, (start, stop) in enumerate(pairwise(starts)):
        k, v = key[start:stop].transpose(0, 1), value[start:stop].transpose(0, 1)
        if members is not None:
            k, v = k[members.key_heads[b]], v[members.value_heads[b]]
        states.append((k, v))
    return states


def packed_near(key: Tensor, value: Tensor, starts: list[int], sinks: int) -> list[NearKeys]:
    """The near keys of prompts without context out of K and V ``[T, G, D]`` of all heads."""
    near = []
    for start, stop in pairwise(starts):
        parts = (
            torch.cat([x[start : min(start + sinks, stop)], x[start:stop]]).transpose(0, 1)[None]
            for x in (key, value)
        )
        near.append(NearKeys(*parts))
    return near


def attend(
    query: Tensor,
    states: list[States],
    membership: Membership,
    out: Tensor,
    starts: list[int],
    *,
    scale: float,
    softcap: float | None,
    rows: Tensor | None,
    probe: Probe | None,
    window: Window | None,
    return_lse: bool,
) -> Tensor | None:
    """Write ``out`` sequence by sequence from K and V ``[heads, S, D]`` of each; return the lse."""
    members = rows_of(membership, rows, len(states))
    lse = query.new_empty(query.shape[0], membership.clusters, dtype=torch.float32)
    for b, (key, value) in enumerate(states):
        tokens = slice(starts[b], starts[b + 1])
        if tokens.start == tokens.stop:
            continue
        member = members.select(torch.tensor([b], device=query.device))
        part = query[tokens].transpose(0, 1)[None]
        if window is None:
            if part.shape[1] != member.clusters:
                part = part[:, member.slot_heads[0]]
            result, part_lse = reference.attention(
                part, key[None], value[None], member, scale=scale, softcap=softcap,
                return_lse=return_lse,
            )  # fmt: skip
            out[tokens] = result[0]
            if part_lse is not None:
                lse[tokens] = part_lse[0].T
        else:
            out[tokens] = _with_window(part, key, value, member, window, b, scale, softcap)
        if probe is not None and key.shape[1] == tokens.stop - tokens.start:
            first = slice(tokens.start, min(tokens.stop, tokens.start + probe.end))
            own = Membership.identity(member.heads, member.kv_heads, device=query.device)
            q, k, v = (x[first].transpose(0, 1)[None] for x in probe[:3])
            exact, _ = reference.attention(q, k, v, own, scale=scale, softcap=softcap)
            out[first] = exact[0]
    return lse if return_lse else None


def _with_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    member: Membership,
    window: Window,
    b: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """``[Q, H, Dv]`` of one sequence; zeros if it has no keys."""
    size, queries = key.shape[1], query.shape[2]
    if not size:
        return query.new_zeros(queries, member.heads, value.shape[2])
    tables = windowed.window_tables(size, queries, window.recent, window.sinks, None, query.device)
    offset = None if window.offset is None else window.offset[b : b + 1]
    return windowed.attention(
        query, key[None], value[None], member, window.near[b], tables, scale=scale, offset=offset,
        softcap=softcap,
    )[0]  # fmt: skip
