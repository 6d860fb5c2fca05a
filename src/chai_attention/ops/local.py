"""The exact part of windowed attention: every head's own scores of its nearest keys.

Queries go in blocks, each of which sees a band of keys, so that work and memory grow with the
window and not with the context. The attention of all other keys joins the softmax as one more
key: its score is their log-sum-exp, its V their output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chai_attention.ops.call import AttentionCall
from chai_attention.ops.scratch import shaped
from chai_attention.ops.windowed import WindowTables, blocks_of

SCORES = 2**22  # numbers in the scores that are held at a time, if of more sequences than one


class LocalKeys(NamedTuple):
    """K and V that all heads see with their own scores, in the natural order of K/V heads.

    Attributes:
        key: ``[B, G, s + L, D]`` of the first real tokens, in their order, and of the last L
            tokens, new ones included: L is the number of new tokens plus ``recent - 1``, or all
            tokens if they are fewer. A sequence with fewer real tokens has any in their place.
        value: ``[B, G, s + L, Dv]`` of the same tokens.
    """

    key: Tensor
    value: Tensor


class Far(NamedTuple):
    """Attention over all other keys, of the last Q' queries; those before see none.

    Attributes:
        out: ``[B, Q', H', Dv]``.
        lse: ``[B, H, Q']`` float32, log-sum-exp with each head's offset; minus infinity for
            streaming heads.
        heads: the H' heads of ``out``; None for all.
    """

    out: Tensor
    lse: Tensor
    heads: list[int] | None = None


def band_attention(
    query: Tensor, local: LocalKeys, tables: WindowTables, far: Far | None, call: AttentionCall
) -> Tensor:
    """Attend to the nearest keys and, as one key more, to what ``far`` found.

    Args:
        query: ``[B, heads, Q, D]``: all heads, or, without ``far``, some.
        local: the keys, of these heads' K/V heads.
        tables: of these queries.
        far: attention over the other keys; None if there are none.
        call: its scale and softcap count.

    Returns:
        ``[B, Q, heads, Dv]`` in the dtype of V.
    """
    batch, heads, queries, _ = query.shape
    out = local.value.new_empty(batch, queries, heads, local.value.shape[3])
    if far is not None:  # queries before the last ones see none
        far = far._replace(lse=F.pad(far.lse, (queries - far.lse.shape[2], 0), value=-torch.inf))
    size = blocks_of(queries, tables.recent).size
    each = max(1, SCORES // (heads * size * (size + tables.recent + tables.sinks)))
    for start in range(0, batch, each):
        rows = slice(start, start + each)

        def bias(block: int, rows: slice = rows) -> Tensor | None:
            found = tables.bias(block)
            return found if found is None or found.shape[0] == 1 else found[rows]

        _attend(
            query[rows],
            LocalKeys(local.key[rows], local.value[rows]),
            bias,
            None if far is None else Far(far.out[rows], far.lse[rows], far.heads),
            tables,
            call,
            out[rows],
        )
    return out


def _attend(
    query: Tensor,
    local: LocalKeys,
    bias_of: Callable[[int], Tensor | None],
    far: Far | None,
    tables: WindowTables,
    call: AttentionCall,
    out: Tensor,
) -> None:
    """`band_attention` of some sequences, block after block, into ``out``."""
    batch, heads, queries, dim = query.shape
    groups, sinks, dtype = local.key.shape[1], tables.sinks, local.value.dtype
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    blocks = blocks_of(queries, tables.recent)
    width = blocks.size + tables.recent - 1  # keys of a band
    held = local.key.shape[2] - sinks
    ahead = queries + tables.recent - 1 - held  # keys of a band that are before the first token

    # Memory for all blocks: new one for each would cost as much in page faults as the softmax.
    columns = width + sinks + (far is not None)
    key_room = query.new_empty(batch, groups, columns, dim, dtype=work)
    value_room = local.value.new_empty(batch, groups, columns, out.shape[3])
    for room, states in ((key_room, local.key), (value_room, local.value)):
        room[:, :, width : width + sinks] = states[:, :, :sinks]
        room[:, :, width + sinks :] = 0.0  # what is far comes with its score and output
    numbers = batch * heads * blocks.size
    query_room = query.new_empty(numbers * dim, dtype=work)
    score_room = query.new_empty(numbers * columns, dtype=work)
    prob_room = torch.empty_like(score_room)
    low_room = local.value.new_empty(numbers * columns if dtype != work else 0)
    result_room = local.value.new_empty(numbers * out.shape[3])

    for block in range(blocks.number):
        start, stop = blocks.rows(block, queries)
        lacks = max(0, -start)
        begin = max(lacks, ahead - start)  # first column of the band that exists
        start, rows = start + lacks, blocks.size - lacks
        for room, states in ((key_room, local.key), (value_room, local.value)):
            first = sinks + start - lacks + begin - ahead
            room[:, :, begin:width] = states[:, :, first : first + width - begin]
        keys, values = (room.flatten(0, 1)[:, begin:] for room in (key_room, value_room))
        seen = columns - begin
        # the rows of all heads of a K/V head side by side: one product for them
        shape = (batch * groups, heads // groups * rows)
        q = shaped(query_room, batch, heads, rows, dim)
        torch.mul(query[:, :, start:stop], call.scale, out=q)
        scores = torch.bmm(q.view(*shape, dim), keys.mT, out=shaped(score_room, *shape, seen))
        if call.softcap is not None:
            scores.div_(call.softcap).tanh_().mul_(call.softcap)
        by_head = scores.view(batch, heads, rows, seen)
        if far is not None:
            by_head[..., -1] = far.lse[:, :, start:stop]
        bias = bias_of(block)
        if bias is not None:
            bias = bias[:, None, lacks:, begin:]
            by_head += bias if far is not None else bias[..., :seen]
        probs = torch.softmax(scores, -1, out=shaped(prob_room, *shape, seen))
        if tables.padded:
            probs.nan_to_num_(0.0)
        low = shaped(low_room, *shape, seen).copy_(probs) if low_room.numel() else probs
        result = torch.bmm(low, values, out=shaped(result_room, *shape, values.shape[2]))
        weight = None if far is None else low.view(batch, heads, rows, seen)[..., -1:]
        _store(result.view(batch, heads, rows, -1), weight, far, start, out)


def _store(result: Tensor, weight: Tensor | None, far: Far | None, start: int, out: Tensor) -> None:
    """Write a block ``[B, H, rows, Dv]`` with the far keys' share to ``out [B, Q, H, Dv]``."""
    rows, queries = result.shape[2], out.shape[1]
    out = out[:, start : start + rows]
    result = result.transpose(1, 2)
    if far is None or weight is None:
        out.copy_(result)
        return
    early = queries - far.out.shape[1]  # queries that see no far key
    skip = min(max(0, early - start), rows)
    if skip or far.heads is not None:
        out.copy_(result)
    if skip == rows:
        return
    weight = weight.transpose(1, 2)[:, skip:]  # [B, rows, H, 1]
    states = far.out[:, start + skip - early : start + rows - early]
    if far.heads is not None:
        heads = torch.tensor(far.heads, device=out.device)
        out[:, skip:].index_add_(2, heads, states * weight[:, :, far.heads])
    elif skip:
        out[:, skip:].addcmul_(weight, states)
    else:
        torch.addcmul(result, weight, states, out=out)
