"""The exact part of windowed attention: every head's own scores of its nearest keys.

Queries go in blocks, each of which sees a band of keys, so that work and memory grow with the
window and not with the context. The attention of all other keys joins the softmax as one more
key: its score is their log-sum-exp, its V their output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_BLOCK = 32  # queries of a block where the window is shorter
SCORES = 2**24  # numbers in the scores that are held at a time


class NearKeys(NamedTuple):
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


def blocks_of(queries: int, recent: int) -> tuple[int, int]:
    """Number and size of the blocks that ``queries`` are dealt into; the last may be cut."""
    block = min(queries, max(recent, LEAST_BLOCK))
    return -(-queries // block), block


def attention(
    query: Tensor,
    near: NearKeys,
    seen: Tensor | None,
    far: Far | None,
    *,
    recent: int,
    sinks: int,
    padded: bool,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attend to the nearest keys and, as one key more, to what ``far`` found.

    Args:
        query: ``[B, H, Q, D]``, all heads.
        near: the keys.
        seen: ``[B or 1, 1, blocks, 1, block, columns]`` bool, which columns each query sees: sinks,
            keys of the block's band, and what is far, if there is any. None for all. See
            `WindowTables`.
        far: attention over the other keys; None if there are none.
        recent: w.
        sinks: s, of ``near``.
        padded: whether some query may see no key at all, and gets zeros.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.

    Returns:
        ``[B, Q, H, Dv]`` in the dtype of V.
    """
    queries = query.shape[2]
    count, block = blocks_of(queries, recent)
    lse = None if far is None else _padded(far.lse, queries - far.lse.shape[2], 0, -torch.inf)
    options = _Options(count, sinks, padded, scale, softcap)
    if count == 1:
        part = _finish(*_blocks(query, near, None, seen, lse, options), far, 0, queries)
        return part.to(near.value.dtype)

    # a whole band for every block: before the first token and behind the last one
    first = NearKeys(near.key[:, :, :sinks], near.value[:, :, :sinks])
    ahead, behind = queries + recent - 1 - (near.key.shape[2] - sinks), count * block - queries
    query = _padded(query, 0, behind)
    key, value = (_padded(states[:, :, sinks:], ahead, behind) for states in near)
    lse = None if lse is None else _padded(lse, 0, behind)
    width = block + recent - 1  # keys of a band
    each = max(1, SCORES // (query.shape[0] * query.shape[1] * block * (width + sinks)))
    parts = []
    for start in range(0, count, each):
        stop = min(start + each, count)
        rows = slice(start * block, stop * block)
        band = slice(start * block, (stop - 1) * block + width)
        result = _blocks(
            query[:, :, rows],
            NearKeys(key[:, :, band], value[:, :, band]),
            first,
            None if seen is None else seen[:, :, start:stop],
            None if lse is None else lse[:, :, rows],
            options._replace(blocks=stop - start),
        )
        part = _finish(*result, far, rows.start, queries)
        parts.append(part[:, : queries - rows.start].to(value.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Options(NamedTuple):
    blocks: int
    sinks: int
    padded: bool
    scale: float
    softcap: float | None


def _blocks(
    query: Tensor,
    near: NearKeys,
    first: NearKeys | None,
    seen: Tensor | None,
    far_lse: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor | None]:
    """Whole blocks: the near keys' share ``[B, Q, H, Dv]`` and the far keys' weight.

    ``near`` holds the blocks' bands and ``first`` the sinks; without ``first`` there is one block
    and ``near`` holds both. The weight is ``[B, Q, H, 1]``, None without ``far_lse [B, H, Q]``.
    """
    count, sinks = options.blocks, options.sinks
    batch, heads, queries, _ = query.shape
    groups = near.key.shape[1]
    block, group = queries // count, heads // groups

    # the rows of all heads of a K/V head side by side: one product for them
    q = _by_block(query, groups, count)  # [B * G, blocks * H / G * block, D]
    if first is None:
        columns = [_product(q, near.key.flatten(0, 1).mT)]
    else:
        width = near.key.shape[2] - (count - 1) * block
        bands = near.key.unfold(2, width, block).flatten(0, 2)  # [B * G * blocks, D, width]
        columns = [
            _product(q, first.key.flatten(0, 1).mT),
            _product(q.reshape(len(bands), -1, q.shape[2]), bands).view(*q.shape[:2], width),
        ]
    for scores in columns:
        scores *= options.scale
    if options.softcap is not None:
        columns = [options.softcap * torch.tanh(scores / options.softcap) for scores in columns]
    if far_lse is not None:
        columns.append(_by_block(far_lse[..., None], groups, count).to(columns[0].dtype))
    scores = torch.cat(columns, -1)
    if seen is not None:
        scores.view(batch, groups, count, group, block, -1).masked_fill_(~seen, -torch.inf)
    probs = torch.softmax(scores, -1)
    if options.padded:
        probs.nan_to_num_(0.0)

    weight = None
    if far_lse is not None:
        probs, weight = probs[..., :-1], _by_token(probs[..., -1:], batch, heads, block)
    if first is None:
        result = _product(probs, near.value.flatten(0, 1))
    else:
        values = near.value.unfold(2, width, block).flatten(0, 2).mT
        result = _product(probs[..., sinks:].reshape(len(values), -1, width), values)
        result = result.view(*q.shape[:2], -1)
        result += _product(probs[..., :sinks], first.value.flatten(0, 1))
    return _by_token(result, batch, heads, block), weight


def _finish(
    result: Tensor, weight: Tensor | None, far: Far | None, start: int, queries: int
) -> Tensor:
    """Add the far keys' share to the queries from ``start`` on, of ``queries`` in all."""
    if far is None or weight is None:
        return result
    early = queries - far.out.shape[1]  # queries that see no far key
    begin, stop = max(start, early), min(start + result.shape[1], queries)
    if begin < stop:
        late = slice(begin - start, stop - start)
        out = far.out[:, begin - early : stop - early].to(result.dtype)
        if far.heads is None:
            result[:, late].addcmul_(weight[:, late], out)
        else:
            share = out * weight[:, late, far.heads]
            result[:, late].index_add_(2, torch.tensor(far.heads), share)
    return result


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left [N, m, k] @ right [N, k, n]`` in float32 (float64 if ``right`` is)."""
    if right.is_cuda and right.dtype.itemsize == 2:
        return torch.bmm(left.to(right.dtype), right, out_dtype=torch.float32)
    work = torch.float64 if right.dtype == torch.float64 else torch.float32
    return torch.bmm(left.to(work), right.to(work))


def _padded(states: Tensor, ahead: int, behind: int, value: float = 0.0) -> Tensor:
    """Pad the tokens of ``[B, H, S, D]`` or ``[B, H, S]``."""
    if not ahead and not behind:
        return states  # torch would copy
    sides = (0, 0, ahead, behind) if states.ndim == 4 else (ahead, behind)
    return F.pad(states, sides, value=value)


def _by_block(states: Tensor, groups: int, count: int) -> Tensor:
    """``[B, H, Q, D]`` to ``[B * G, blocks * H / G * block, D]``."""
    batch, heads, queries, dim = states.shape
    if count == 1:
        return states.reshape(batch * groups, -1, dim)
    split = states.reshape(batch * groups, heads // groups, count, queries // count, dim)
    return split.transpose(1, 2).flatten(1, 3)


def _by_token(states: Tensor, batch: int, heads: int, block: int) -> Tensor:
    """``[B * G, blocks * H / G * block, D]`` back to ``[B, Q, H, D]``."""
    groups, dim = states.shape[0] // batch, states.shape[2]
    split = states.reshape(batch, groups, -1, heads // groups, block, dim)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, dim)
