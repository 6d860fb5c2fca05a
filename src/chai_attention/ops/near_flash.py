"""The exact part of windowed attention by torch's fused attention, for prompts on a CPU.

`near.attention` says what is computed. It makes float32 scores, which cost several times more than
torch's kernel on a CPU that multiplies tiles of bfloat16 (`choice` measures it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chai_attention.ops.blocked import DECODE_ROWS
from chai_attention.ops.near import Far, NearKeys, blocks_of

_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def can_run(query: Tensor, near: NearKeys, *, padded: bool, softcap: float | None) -> bool:
    """Whether torch's kernel takes such a call: a prompt whose every query sees some key."""
    return (
        query.device.type == "cpu"
        and _flash is not None
        and softcap is None
        and not padded
        and query.shape[2] > DECODE_ROWS
        and query.shape[3] == near.value.shape[3]
        and query.dtype == near.key.dtype == near.value.dtype
        # torch's own checks are not passed on the way to its kernel
        and all(x.numel() and x.stride(-1) == 1 for x in (query, near.key, near.value))
    )


def attention(
    query: Tensor,
    near: NearKeys,
    bias_of: Callable[[int], Tensor | None],
    far: Far | None,
    *,
    recent: int,
    sinks: int,
    scale: float,
) -> Tensor:
    """Attend to the nearest keys and to what ``far`` found: arguments as in `near.attention`.

    A block of queries is one call: the keys of its band and the sinks side by side. What is far
    joins by the weight that its log-sum-exp has beside that of the near keys.

    Returns:
        ``[B, Q, H, D]`` in the dtype of V.
    """
    batch, heads, queries, dim = query.shape
    groups = near.key.shape[1]
    out = near.value.new_empty(batch, queries, heads, dim)
    blocks = blocks_of(queries, recent)
    width = blocks.size + recent - 1  # keys of a band
    ahead = queries + recent - 1 - (near.key.shape[2] - sinks)  # of them, before the first token
    for block in range(blocks.number):
        start, stop = blocks.rows(block, queries)
        lacks = max(0, -start)
        begin = max(lacks, ahead - start)  # first column of the band that exists
        first = sinks + start + begin - ahead
        start += lacks
        keys, values = (
            torch.cat([x[:, :, first : first + width - begin], x[:, :, :sinks]], 2) for x in near
        )
        mask = None
        bias = bias_of(block)
        if bias is not None:  # [B or 1, rows, columns], without the column of what is far
            mask = bias[:, None, lacks:, begin:-1].to(query.dtype)
        if groups < heads:
            keys, values = (_per_head(x, heads // groups) for x in (keys, values))
        part, lse = _flash(query[:, :, start:stop], keys, values, attn_mask=mask, scale=scale)
        rows = out[:, start:stop]
        rows.copy_(part.transpose(1, 2))
        if far is not None:
            _join(rows, lse.view(batch, heads, stop - start), far, start, queries)
    return out


def _per_head(states: Tensor, each: int) -> Tensor:
    """``[B, G, S, D]`` as ``[B, G * each, S, D]``."""
    return states.repeat_interleave(each, 1)


def _join(rows: Tensor, lse: Tensor, far: Far, start: int, queries: int) -> None:
    """Add what is far to ``rows [B, Q', H, D]``, queries from ``start`` with ``lse [B, H, Q']``."""
    late = start - (queries - far.lse.shape[2])  # the first query's place among those that see it
    skip = min(max(0, -late), rows.shape[1])
    if skip == rows.shape[1]:
        return
    here = slice(late + skip, late + rows.shape[1])
    weight = (far.lse[:, :, here] - lse[:, :, skip:]).sigmoid_()
    weight = weight.transpose(1, 2)[..., None].to(rows.dtype)  # [B, Q', H, 1]
    rows, states = rows[:, skip:], far.out[:, here]
    if far.heads is None:
        rows.lerp_(states, weight)
        return
    heads = torch.tensor(far.heads, device=rows.device)
    rows[:, :, heads] = rows[:, :, heads].lerp(states, weight[:, :, heads])
