"""Decode with an exact recent window over pages: near K and V of removed heads have their own.

A server keeps two kinds of pages. *Far pages* hold K and V of the kept heads for all tokens. *Near
pages* hold K of the removed heads, and V of heads that stream, for the tokens that somebody still
sees near: the last *w* and the first *s* ones, the sinks. Pages that lie wholly between them are
given back. What is computed is `reference.recent_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.reference import near_and_far


@dataclass(frozen=True, eq=False)
class NearPages:
    """K and V that far pages do not hold, near the end and at the start of every sequence.

    Position p of a sequence stands in page ``block_table[b, p // N]``, at ``p % N``.

    Attributes:
        key: ``[P, N, G - kept_keys, D]`` in the order of ``membership.removed_key_heads``; any
            strides but the last; of the far pages' dtype.
        value: ``[P, N, G - kept_values, Dv]`` in that of ``membership.removed_value_heads``, the
            same; no heads where no V head streams.
        block_table: ``[B, max_pages]`` int32, the pages of each sequence. What lies before the
            window, but for the sinks, is not read: any number may stand for such a page.
        recent: w, last keys that every head sees with its own scores; the query's own is one.
        sinks: s, first keys that it does.
    """

    key: Tensor
    value: Tensor
    block_table: Tensor
    recent: int
    sinks: int

    @property
    def page(self) -> int:
        """N, tokens of a page."""
        return self.key.shape[1]


def near_states(pages: Tensor, near: NearPages, is_near: Tensor, dtype: torch.dtype) -> Tensor:
    """K or V of removed heads, ``[B, heads, S, D]``, and zeros where no near key stands.

    Args:
        pages: ``near.key`` or ``near.value``.
        near: whose block table it is.
        is_near: ``[B, S]`` bool, the positions to read.
        dtype: of the result.
    """
    row, position = is_near.nonzero(as_tuple=True)
    page = near.block_table[row, position // near.page].long()
    states = torch.zeros(*is_near.shape, *pages.shape[2:], dtype=dtype, device=pages.device)
    if pages.shape[2]:
        states[row, position] = pages[page, position % near.page].to(dtype)
    return states.transpose(1, 2)


def reference_paged_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    near: NearPages,
    *,
    lengths: Tensor,
    scale: float,
    offset: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with one query per sequence in plain PyTorch: puts K and V of all heads together.

    Args:
        query: ``[B, H, D]``, all heads in their natural order.
        key: ``[B, kept_keys, S, D]`` in the order of ``membership.key_heads``.
        value: ``[B, kept_values, S, Dv]`` in that of ``membership.value_heads``.
        membership: tables of B rows.
        near: K and V of the other heads; holds the new token's already.
        lengths: ``[B]`` integer, keys of each sequence, the new one included.
        scale: factor on the scores.
        offset: ``[B, H]`` float32, added to the log-sum-exp of each head's far keys.
        softcap: as in `ops.reference.attention`.

    Returns:
        ``[B, H, Dv]`` in the query's dtype.
    """
    position = torch.arange(key.shape[2], device=key.device)
    last = lengths.long()[:, None]
    real = position < last  # [B, S]
    is_near = real & ((position >= last - near.recent) | (position < near.sinks))
    states = []
    for kept, pages, place in (
        (key, near.key, membership.key_place),
        (value, near.value, membership.value_place),
    ):
        # what stands behind a sequence's end may be anything
        kept = kept.masked_fill(~real[:, None, :, None], 0.0)
        every = torch.cat([kept, near_states(pages, near, is_near, kept.dtype)], 1)
        states.append(every.gather(1, place[:, :, None, None].expand_as(every)))
    return near_and_far(
        query[:, :, None], states[0], states[1], membership, is_near[:, None, None],
        real[:, None, None], scale=scale, offset=offset, softcap=softcap,
    )[:, 0]  # fmt: skip
