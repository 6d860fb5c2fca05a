"""Packed sequences one by one, as the CPU runs them: what kernels are tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import windowed
from chai_attention.ops.backend import AttentionBackend
from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV, Probe
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.paged import gather_pages, memberships_of

States = tuple[Tensor, Tensor]  # K ``[kept_keys, S, D]`` and V ``[kept_values, S, Dv]``


def _of_pages(
    queries: PackedQueries, pages: PagedKV, call: AttentionCall
) -> tuple[list[States], list[LocalKeys] | None]:
    """K and V of each sequence out of its pages, and local ones if there is a window."""
    states = []
    for table, length in zip(pages.block_table, pages.seq_lens.tolist(), strict=True):
        used = table[None, : -(-length // pages.key.shape[1])]
        key, value = (gather_pages(x, used, queries.query.dtype) for x in (pages.key, pages.value))
        states.append((key[0, :, :length], value[0, :, :length]))
    local = pages.window
    if local is None:
        return states, None
    counts = queries.query_start_loc.diff().tolist()
    members = memberships_of(call.membership, call.membership_ids, len(counts))
    return states, paged_local(local, states, members, counts)


def _of_packed(
    queries: PackedQueries, packed: PackedKV, call: AttentionCall
) -> tuple[list[States], list[LocalKeys] | None]:
    """The same of prompts without context."""
    starts = queries.query_start_loc.tolist()
    key, value = packed.key, packed.value
    members = None
    if packed.natural_order:
        members = memberships_of(call.membership, call.membership_ids, len(starts) - 1)
    states = []
    for b, (start, stop) in enumerate(pairwise(starts)):
        k, v = key[start:stop].transpose(0, 1), value[start:stop].transpose(0, 1)
        if members is not None:
            k, v = k[members.key_heads[b]], v[members.value_heads[b]]
        states.append((k, v))
    if not packed.recent:
        return states, None
    return states, _packed_local(key, value, starts, packed.sinks)


def paged_local(
    pages: LocalPages, states: list[States], members: Membership, queries: list[int]
) -> list[LocalKeys]:
    """The local keys of each sequence: kept heads' of ``states``, the others' of local pages."""
    local = []
    for b, (key, value) in enumerate(states):
        size, page = key.shape[1], pages.key.shape[1]
        band = max(0, size - queries[b] - pages.recent + 1)
        seen = torch.tensor([*range(min(pages.sinks, size)), *range(band, size)], dtype=torch.long)
        # pages that lie before the window and behind the sinks are not looked up
        at = pages.block_table[b, seen // page].long(), seen % page
        local.append(
            LocalKeys(
                torch.cat([key[:, seen], _own(pages.key, at, key)])[members.key_place[b]][None],
                torch.cat([value[:, seen], _own(pages.value, at, value)])[members.value_place[b]][
                    None
                ],
            )
        )
    return local


def _own(pages: Tensor, at: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """``[removed heads, tokens, D]`` out of local pages."""
    return pages[at].transpose(0, 1).to(like.dtype)


def _packed_local(key: Tensor, value: Tensor, starts: list[int], sinks: int) -> list[LocalKeys]:
    """The local keys of prompts without context out of K and V ``[T, G, D]`` of all heads."""
    local = []
    for start, stop in pairwise(starts):
        parts = (
            torch.cat([x[start : min(start + sinks, stop)], x[start:stop]]).transpose(0, 1)[None]
            for x in (key, value)
        )
        local.append(LocalKeys(*parts))
    return local


def attend(
    backend: AttentionBackend,
    queries: PackedQueries,
    kv: PagedKV | PackedKV,
    call: AttentionCall,
    out: Tensor,
    probe: Probe | None,
) -> Tensor | None:
    """Write ``out [T, H, Dv]`` sequence by sequence; return the lse ``[T, k]``.

    Args:
        backend: attends to each sequence.
        queries: of all sequences.
        kv: what they attend to.
        call: how to attend.
        out: written to.
        probe: tokens with full attention.
    """
    if isinstance(kv, PagedKV):
        states, local = _of_pages(queries, kv, call)
    else:
        states, local = _of_packed(queries, kv, call)
    window = kv.window if isinstance(kv, PagedKV) else kv
    query, starts = queries.query, queries.query_start_loc.tolist()
    members = memberships_of(call.membership, call.membership_ids, len(states))
    lse = torch.full((query.shape[0], members.clusters), -torch.inf, device=query.device)
    for b, (key, value) in enumerate(states):
        tokens = slice(starts[b], starts[b + 1])
        if tokens.start == tokens.stop:
            continue
        member = call.membership  # whose tables are made already
        if member.batch > 1:
            member = members.select(torch.tensor([b], device=query.device))
        part = query[tokens].transpose(0, 1)[None]
        whole = DenseKV(key[None], value[None])
        if not key.shape[1]:
            out[tokens] = 0
        elif local is not None and window is not None:
            offset = None if call.offset is None else call.offset[b : b + 1]
            one = AttentionCall(member, call.scale, call.softcap, offset=offset)
            tables = windowed.window_tables(
                key.shape[1], part.shape[2], window.recent, window.sinks, None, query.device
            )
            out[tokens] = backend.attend_window(part, whole, local[b], tables, one)[0]
        else:
            if part.shape[1] != member.clusters:
                part = part[:, member.slot_heads[0]]
            one = AttentionCall(member, call.scale, call.softcap, return_lse=call.return_lse)
            result, part_lse = backend.attend(part, whole, one)
            out[tokens] = result[0]
            if part_lse is not None:
                lse[tokens] = part_lse[0].T
        if probe is not None and key.shape[1] == tokens.stop - tokens.start:
            first = slice(tokens.start, min(tokens.stop, tokens.start + probe.end))
            own = Membership.identity(member.heads, member.kv_heads, device=query.device)
            q, k, v = (x[first].transpose(0, 1)[None] for x in probe[:3])
            one = AttentionCall(own, call.scale, call.softcap)
            out[first] = backend.attend(q, DenseKV(k, v), one)[0][0]
    return lse if call.return_lse else None
