"""Heads of Q, K and V, chosen for each sequence of a batch."""

from __future__ import annotations

from torch import Tensor

from chai_attention.membership import Membership


def pick_heads(states: Tensor, heads: Tensor, axis: int = 1) -> Tensor:
    """Choose ``heads [B, n]`` of each sequence along ``axis`` (1 or 2) of ``states``.

    ``[B, H, S, D]`` becomes ``[B, n, S, D]`` (axis 1), ``[B, S, H, D]`` ``[B, S, n, D]`` (axis 2).
    """
    if states.shape[0] == 1:
        return states.index_select(axis, heads[0])
    shape = list(states.shape)
    shape[axis] = heads.shape[1]
    index = heads[:, :, None, None] if axis == 1 else heads[:, None, :, None]
    return states.gather(axis, index.expand(shape))


def slot_queries(membership: Membership, query: Tensor) -> Tensor:
    """Q of representatives in slot order, ``[B, k, Q, D]``.

    Args:
        membership: of the layer.
        query: ``[B, H, Q, D]`` of all heads.
    """
    if query.shape[1] == membership.clusters:
        return query
    return pick_heads(query, membership.slot_heads)
