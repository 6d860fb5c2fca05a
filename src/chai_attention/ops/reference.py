"""The definition of clustered head attention, in plain PyTorch.

Slow and readable on purpose: every other implementation is tested against this page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, DenseKV
from chai_attention.ops.rolling_buffer import RollingBuffer


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    *,
    scale: float,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention in which every head uses its representative's probabilities.

    Head h returns ``softmax(Q_r K_r^T * scale + mask) V_h`` with ``r`` its representative
    (CHAI, section 3.1). Query i of a row stands at position ``length - Q + i``.

    Args:
        query: ``[B, k, Q, D]``, queries of the representatives in slot order.
        key: ``[B, kept_keys, S, D]``, in the order of ``membership.key_heads``.
        value: ``[B, G, S, Dv]``, in the order of ``membership.value_heads``.
        membership: tables of B rows.
        scale: factor on the scores, usually ``D ** -0.5``.
        lengths: ``[B]`` integer, keys in use of each row (the rest of S is unused capacity);
            None when all S are.
        valid: ``[B, S]`` bool, False where a key must not be seen (padding).
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        return_lse: also return the log-sum-exp of the masked scores.

    Returns:
        ``out [B, Q, H, Dv]`` in the natural order of heads and the dtype of ``value``, and
        ``lse [B, k, Q]`` float32 (natural logarithm) or None. A query that sees no key gives
        zeros and an lse of minus infinity.
    """
    batch, _, queries, dim = query.shape
    size, value_dim = key.shape[2], value.shape[3]
    work = torch.float64 if query.dtype == torch.float64 else torch.float32

    slot_keys = key.gather(1, membership.key_slot[:, :, None, None].expand(-1, -1, size, dim))
    scores = query.to(work) @ slot_keys.to(work).mT * scale  # [B, k, Q, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(
        ~visible(batch, queries, size, lengths, valid, key.device), -torch.inf
    )

    probs = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a row that sees nothing is all -inf
    probs = probs.gather(1, membership.slot[:, :, None, None].expand(-1, -1, queries, size))
    head_values = value.gather(
        1, membership.value_slot[:, :, None, None].expand(-1, -1, size, value_dim)
    )  # [B, H, S, Dv]
    out = (probs @ head_values.to(work)).transpose(1, 2).to(value.dtype)  # [B, Q, H, Dv]
    lse = torch.logsumexp(scores, dim=-1).float() if return_lse else None
    return out, lse


def recent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    *,
    recent: int,
    sinks: int,
    scale: float,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Clustered attention with an exact recent window, from Q, K and V of all heads.

    To query i, the keys ``i - recent < j <= i`` and the first ``sinks`` real ones are local: head
    h uses its own scores for them. For all other keys it uses those of its representative r, plus
    ``offsets[h, r]``. Of the local ones with log-sum-exp n and output a, and the others with
    log-sum-exp f (offset included) and output b, it returns ``(e^n a + e^f b) / (e^n + e^f)``.
    A streaming head sees local keys only: it returns a (its f is minus infinity).

    Args:
        query: ``[B, H, Q, D]`` of the last Q tokens.
        key: ``[B, G, S, D]``.
        value: ``[B, G, S, Dv]``.
        membership: tables of B rows.
        recent: w.
        sinks: s.
        scale: factor on the scores.
        offsets: ``[H, H]``; its diagonal is not used. None for zeros.
        valid: ``[B, S]`` bool, False for padding.
        softcap: as in `clustered_attention`.

    Returns:
        ``[B, Q, H, Dv]``; zeros for a query that sees no key.
    """
    batch, _, queries, _ = query.shape
    size, device, rep = key.shape[2], key.device, membership.representatives
    offset = None
    if offsets is not None:
        each = torch.arange(membership.heads, device=device)
        offset = torch.where(rep == each, 0.0, offsets[each, rep])  # [B, H]
    real = torch.ones(batch, size, dtype=torch.bool, device=device) if valid is None else valid
    position = torch.arange(size - queries, size, device=device)[:, None]
    local = torch.arange(size, device=device) > position - recent  # [Q, S]
    local = local | (real.cumsum(1) <= sinks)[:, None, None]  # [B, 1, Q, S]
    seen = visible(batch, queries, size, None, valid, device)
    return local_and_far(
        query, key, value, membership, local, seen, scale=scale, offset=offset, softcap=softcap
    )


def local_and_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    local: Tensor,
    seen: Tensor,
    *,
    scale: float,
    offset: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention by own scores of local keys, and by the representative's of all others.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``; those that only stand far may be anything for removed heads.
        value: ``[B, G, S, Dv]``, finite; the same.
        membership: tables of B rows.
        local: ``[B or 1, 1, Q, S]`` bool, which keys are local to each query.
        seen: the same, which keys it sees at all.
        scale: factor on the scores.
        offset: ``[B, H]``, added to the scores of far keys; None for zeros.
        softcap: as in `clustered_attention`.

    Returns:
        ``[B, Q, H, Dv]`` in the query's dtype; zeros for a query that sees no key.
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (x.to(work).repeat_interleave(membership.group_size, 1) for x in (key, value))
    own = query.to(work) @ key.mT * scale  # [B, H, Q, S]
    if softcap is not None:
        own = softcap * torch.tanh(own / softcap)
    shared = own.gather(1, membership.representatives[:, :, None, None].expand_as(own))
    if offset is not None:
        shared = shared + offset[:, :, None, None]
    if membership.streaming:
        shared = shared.masked_fill(membership.streams[:, None, None], -torch.inf)
    scores = torch.where(local, own, shared).masked_fill(~seen, -torch.inf)
    probs = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    # one softmax over both kinds of scores is the merge by log-sum-exp
    return (probs @ value).transpose(1, 2).to(query.dtype)


def decode_recent(query: Tensor, kv: DenseKV, local: RollingBuffer, call: AttentionCall) -> Tensor:
    """`dispatch.decode_recent`: puts K and V of all heads together, sequence by sequence."""
    key, value, lengths, membership = kv.key, kv.value, kv.lengths, call.membership
    if membership.batch != query.shape[0]:
        membership = membership.expand(query.shape[0])
    size, dim = key.shape[2:]
    position = torch.arange(size, device=key.device)
    if lengths is None:
        lengths = torch.full((query.shape[0],), size, device=key.device)
    last = lengths.long()[:, None]
    real = position < last
    if kv.valid is not None:
        real = real & kv.valid[:, :size]
    # K and V of removed heads at every position; what no memory holds is far: nobody asks for it
    oldest = (last - 1 - (last - 1 - position) % local.size).clamp_min(0)
    held = torch.where(position == oldest, (position + local.shift) % local.size, 0)  # [B, S]
    is_sink = torch.zeros_like(real)
    caches, memories = [key, value], local.memories
    for index, (ring, sinks) in enumerate(memories):
        removed = ring.gather(
            2, held[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3])
        )  # [B, removed heads, S, D]
        for column in range(sinks.shape[2]):
            at = local.sink_positions[:, column].long()
            here = (position == at[:, None]) & real
            is_sink |= here
            # inside the window the ring holds the same
            removed = torch.where(here[:, None, :, None], sinks[:, :, column, None], removed)
        caches[index] = torch.cat([caches[index], removed], 1)
    every, values = caches  # [B, G, S, D], [B, G, S, Dv]
    every = every.gather(1, membership.key_place[:, :, None, None].expand(-1, -1, size, dim))
    place = membership.value_place[:, :, None, None].expand(-1, -1, size, value.shape[3])
    values = values.gather(1, place).masked_fill(~real[:, None, :, None], 0.0)
    is_local = (position >= last - local.recent) | is_sink
    return local_and_far(
        query, every, values, membership, is_local[:, None, None], real[:, None, None],
        scale=call.scale, offset=call.offset, softcap=call.softcap,
    ).to(value.dtype)  # fmt: skip


def visible(
    batch: int,
    queries: int,
    size: int,
    lengths: Tensor | None,
    valid: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which keys each query may see: ``[B, 1, Q, S]`` bool, causal from the last position."""
    if lengths is None:
        lengths = torch.full((batch,), size, device=device)
    position = lengths[:, None] - queries + torch.arange(queries, device=device)  # [B, Q]
    seen = torch.arange(size, device=device) <= position[:, None, :, None]
    return seen if valid is None else seen & valid[:, None, None, :]
