"""Pages in plain PyTorch: K and V of each sequence out of them, and decode."""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import reference
from chai_attention.ops.call import AttentionCall, PagedKV
from chai_attention.ops.local_pages import LocalPages


def paged_decode(query: Tensor, pages: PagedKV, call: AttentionCall, out: Tensor) -> Tensor | None:
    """`dispatch.paged_decode` into ``out``, by K and V that are put together per sequence."""
    lengths = pages.seq_lens
    member = memberships_of(call.membership, call.membership_ids, query.shape[0])
    size = int(lengths.max()) if len(lengths) else 0
    used = pages.block_table[:, : -(-size // pages.key.shape[1])]
    key, value = (
        hide_spare(gather_pages(x, used, query.dtype)[:, :, :size], lengths)
        for x in (pages.key, pages.value)
    )
    if pages.window is not None:
        out.copy_(_with_window(query, key, value, member, pages.window, lengths, call))
        return None
    if query.shape[1] != member.clusters:
        query = query.gather(1, member.slot_heads[:, :, None].expand(-1, -1, query.shape[2]))
    result, lse = reference.clustered_attention(
        query[:, :, None], key, value, member, lengths=lengths, scale=call.scale,
        softcap=call.softcap, return_lse=call.return_lse,
    )  # fmt: skip
    out.copy_(result[:, 0])
    return None if lse is None else lse[:, :, 0]


def _with_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    member: Membership,
    local: LocalPages,
    lengths: Tensor,
    call: AttentionCall,
) -> Tensor:
    """``[B, H, Dv]`` from K and V of the far pages, ``[B, heads, S, D]``, and the local ones."""
    position = torch.arange(key.shape[2], device=key.device)
    last = lengths.long()[:, None]
    real = position < last  # [B, S]
    is_local = real & ((position >= last - local.recent) | (position < local.sinks))
    states = []
    for kept, own, place in (
        (key, local.key, member.key_place),
        (value, local.value, member.value_place),
    ):
        every = torch.cat([kept, _local_states(own, local, is_local, kept.dtype)], 1)
        states.append(every.gather(1, place[:, :, None, None].expand_as(every)))
    return reference.local_and_far(
        query[:, :, None], states[0], states[1], member, is_local[:, None, None],
        real[:, None, None], scale=call.scale, offset=call.offset, softcap=call.softcap,
    )[:, 0]  # fmt: skip


def _local_states(pages: Tensor, local: LocalPages, is_local: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, heads, S, D]`` out of ``pages``, local K or V; zeros where no local key stands."""
    row, position = is_local.nonzero(as_tuple=True)
    page = local.block_table[row, position // local.page].long()
    states = torch.zeros(*is_local.shape, *pages.shape[2:], dtype=dtype, device=pages.device)
    if pages.shape[2]:
        states[row, position] = pages[page, position % local.page].to(dtype)
    return states.transpose(1, 2)


def memberships_of(membership: Membership, ids: Tensor | None, batch: int) -> Membership:
    """The membership of each of ``batch`` sequences."""
    if ids is not None:
        return membership.select(ids.long())
    return membership if membership.batch == batch else membership.expand(batch)


def gather_pages(pages: Tensor, block_table: Tensor, dtype: torch.dtype) -> Tensor:
    """``[P, N, heads, D]`` of ``[B, max_pages]`` pages: ``[B, heads, max_pages * N, D]``."""
    if not pages.shape[2]:  # all heads stream: there need not be any page
        size = block_table.shape[1] * pages.shape[1]
        return pages.new_zeros(len(block_table), 0, size, pages.shape[3]).to(dtype)
    return pages[block_table.long()].flatten(1, 2).transpose(1, 2).to(dtype)


def hide_spare(states: Tensor, lengths: Tensor) -> Tensor:
    """Zeros in place of what stands behind each sequence's end, which may be anything."""
    spare = torch.arange(states.shape[2], device=states.device) >= lengths[:, None]
    return states.masked_fill(spare[:, None, :, None], 0.0)
