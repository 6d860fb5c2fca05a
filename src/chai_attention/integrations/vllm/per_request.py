"""Attention of one request after the other, by the operations of `ops`.

The CPU runs everything so, which has few requests at a time. K and V of a request are copied out of
its pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import attention, windowed
from chai_attention.ops.near import NearKeys
from chai_attention.runtime.heads import pick_heads


@dataclass(frozen=True, eq=False)
class Request:
    """New tokens of one request and what they attend to.

    Attributes:
        query: ``[1, H, Q, D]``, all heads in their natural order.
        key: ``[1, G, Q, D]`` of the new tokens, all heads.
        value: ``[1, G, Q, Dv]``, the same.
        keys: ``[1, kept, S, D]`` of all tokens, in the order of the membership's cache.
        values: ``[1, kept values, S, Dv]``, the same.
        membership: of one row.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    membership: Membership
    scale: float
    softcap: float | None

    def attend(self) -> Tensor:
        """Attention by clusters: ``[Q, H, Dv]``."""
        query = self.query
        if not self.membership.is_identity:
            query = pick_heads(query, self.membership.slot_heads)
        return attention(
            query, self.keys, self.values, self.membership, scale=self.scale, softcap=self.softcap
        )[0][0]

    def attend_fully(self, count: int) -> Tensor:
        """Every head's own attention of the first ``count`` tokens, which are all new."""
        member = Membership.identity(
            self.membership.heads, self.membership.kv_heads, 1, self.query.device
        )
        query, key, value = (x[:, :, :count] for x in (self.query, self.key, self.value))
        return attention(query, key, value, member, scale=self.scale, softcap=self.softcap)[0][0]

    def attend_near(self, recent: int, sinks: int, offset: Tensor | None, near: NearKeys) -> Tensor:
        """Attention with an exact recent window: ``[Q, H, Dv]``.

        Args:
            recent: w.
            sinks: s.
            offset: ``[1, H]`` (`windowed.head_offsets`) or None.
            near: K and V of all heads of the first tokens and of those near the new ones.
        """
        length, queries = self.keys.shape[2], self.query.shape[2]
        tables = windowed.window_tables(length, queries, recent, sinks, None, self.query.device)
        return windowed.attention(
            self.query,
            self.keys,
            self.values,
            self.membership,
            near,
            tables,
            scale=self.scale,
            offset=offset,
            softcap=self.softcap,
        )[0]


def from_pages(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Copy a request's K or V out of its pages.

    Args:
        pages: ``[P, N, heads, D]``.
        table: ``[max_pages]``, its pages.
        length: S.

    Returns:
        ``[1, heads, S, D]``, token by token in memory.
    """
    count = -(-length // pages.shape[1])
    return pages[table[:count].long()].flatten(0, 1)[:length].transpose(0, 1)[None]
