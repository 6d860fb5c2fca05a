"""The cost of a head using another head's attention map, or attending to local keys only.

Numbers of one layer and sequence. With an exact recent window a head keeps its own scores for local
keys, the last w and the first s, and uses the other head's only for far ones; the two parts are
weighed by their log-sum-exp, the far one's shifted by an offset (see `ops.windowed`). A streaming
head has no far part.

One set of maps serves windows of several sizes w. Keys are cut into bands by their distance from
the query, so that the local keys of each w are some first bands, and its far keys the others.
Outputs of bands are merged by their log-sum-exp.

Queries are computed in blocks, which are smaller where they see more keys, so that memory does not
depend on the length of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isqrt

import torch
from torch import Tensor

from chai_attention.integrations.transformers.room import ROWS
from chai_attention.ops.reference_backend import SCORES

ALIGNED = 16  # queries of a block are a multiple of this, where there are so many


@dataclass(frozen=True)
class Maps:
    """Attention maps of all heads for some queries of one sequence.

    Attributes:
        rows: which queries.
        whole: ``[H, R, S]`` probabilities over all keys up to the last of the queries.
    """

    rows: slice
    whole: Tensor


@dataclass(frozen=True)
class Band:
    """The keys within some distances of their query, or the first ones.

    Attributes:
        keys: which keys; ``n`` of them.
        scores: ``[H, R, n]``, without their scale, minus infinity for keys that are not of a
            query's band. The first property that is read uses their memory.
        scale: factor on the scores, above 0.
    """

    keys: slice
    scores: Tensor
    scale: float

    @cached_property
    def _top(self) -> Tensor:
        top = self.scores.amax(-1, keepdim=True).mul_(self.scale)
        return top.masked_fill_(top == -torch.inf, 0.0)

    @cached_property
    def weights(self) -> Tensor:
        """``[H, R, n]``, probabilities times `total`: zeros for queries without a key."""
        # the factor costs nothing here, and elsewhere as much as the exponential
        return torch.add(-self._top, self.scores, alpha=self.scale, out=self.scores).exp_()

    @cached_property
    def _sum(self) -> Tensor:
        return self.weights.sum(-1)

    @property
    def total(self) -> Tensor:
        """``[H, R]`` sums of the weights, 1 for queries that have no key in the band."""
        return self._sum.masked_fill(self._sum == 0, 1.0)

    @property
    def lse(self) -> Tensor:
        """``[H, R]`` log-sum-exp of the scores, minus infinity for queries without a key."""
        return self._top[..., 0] + self._sum.log()


@dataclass(frozen=True)
class Bands:
    """Scores of all heads for some queries of one sequence, cut into bands.

    Attributes:
        rows: which queries.
        bands: the first keys if there are sinks, then from the nearest to the farthest.
        local: for every w, ascending, how many bands at the beginning are local.
    """

    rows: slice
    bands: tuple[Band, ...]
    local: tuple[int, ...]

    def local_and_far_lse(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For every w, log-sum-exp of local and of far scores, ``[H, R]`` each."""
        lse = torch.stack([band.lse for band in self.bands])
        for count in self.local:
            yield lse[:count].logsumexp(0), lse[count:].logsumexp(0)


@dataclass(frozen=True)
class PairCosts:
    """Costs of a layer, summed over queries.

    Attributes:
        sharing: ``[H (h), H (r)]``, of head h using head r's scores.
        streaming: ``[H]``, of a head seeing local keys only; None without a window.
    """

    sharing: Tensor
    streaming: Tensor | None


def maps_of(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Iterator[Maps]:
    """Causal maps of ``query [H, S, D]`` over ``key [G, S, D]``, some queries at a time."""
    for rows, scores, left in _scores(query, key, scale, softcap):
        made = [torch.softmax(scores if left == 1 else scores.mul_(left), -1)]
        del scores
        yield Maps(rows, made.pop())  # nothing of a block is held while the next one is made


def bands_of(
    query: Tensor,
    key: Tensor,
    scale: float,
    softcap: float | None,
    recents: Sequence[int] = (),
    sinks: int = 0,
) -> Iterator[Bands]:
    """Scores of ``query [H, S, D]`` over ``key [G, S, D]``, some queries at a time.

    Args:
        query: with rotary embedding.
        key: with rotary embedding.
        scale: factor on the scores.
        softcap: cap on the scores, or None.
        recents: every w, ascending, at least 1; none for a single band of all keys.
        sinks: s, of all of them.
    """
    bounds = [0, *recents, query.shape[1] + 1] if recents else []
    local = tuple(range(1 + bool(sinks), 1 + bool(sinks) + len(recents)))
    for rows, scores, left in _scores(query, key, scale, softcap):
        made = [Bands(rows, _cut(scores, rows, bounds, sinks, left), local)]
        del scores
        yield made.pop()


def _cut(
    scores: Tensor, rows: slice, bounds: Sequence[int], sinks: int, scale: float
) -> tuple[Band, ...]:
    """Cut scores ``[H, R, S]`` at these distances; the last band is made in their memory."""
    seen = rows.stop
    if not bounds:
        return (Band(slice(0, seen), scores, scale),)
    bands = []
    if sinks:
        first = slice(0, min(sinks, seen))
        bands.append(Band(first, scores[..., first].clone(), scale))
    pairs = list(pairwise(bounds))
    for number, (low, high) in enumerate(pairs, start=1):
        # at least one key, which the mask hides where the band has none
        start = min(max(sinks, rows.start - high + 1), seen - 1)
        keys = slice(start, max(seen - low, start + 1))
        part = scores[..., keys]
        if number < len(pairs):
            part = part.clone()
        # what is between is seen by all of the queries
        left = max(seen - high, sinks, start)
        right = max(left, rows.start - low + 1)
        for ends in (slice(start, min(left, keys.stop)), slice(right, keys.stop)):
            if ends.start < ends.stop:
                hidden = _outside(rows, ends, low, high, sinks, scores.device)
                part[..., ends.start - start : ends.stop - start].masked_fill_(hidden, -torch.inf)
        bands.append(Band(keys, part, scale))
    return tuple(bands)


def _outside(
    rows: slice, keys: slice, low: int, high: int, sinks: int, device: torch.device
) -> Tensor:
    """``[R, n]``: whether a key is nearer than ``low``, as far as ``high``, or a sink."""
    position = torch.arange(rows.start, rows.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    distance = position - key
    return (distance < low) | (distance >= high) | (key < sinks)


def _scores(
    query: Tensor, key: Tensor, scale: float, softcap: float | None
) -> Iterator[tuple[slice, Tensor, float]]:
    """Queries, their causal scores ``[H, R, S]`` up to the last, and the factor they still lack.

    The scores are the caller's to use up.
    """
    key = factor(key)
    # the last queries, which see the most keys, come first: what they leave is room for the others,
    # where growing blocks would each take new memory
    for rows in reversed(list(_blocks(query.shape[0], query.shape[1]))):
        scores = [_score_block(query[:, rows], key[:, : rows.stop], rows, scale, softcap)]
        yield rows, scores.pop(), scale if softcap is None else 1.0


def _score_block(
    query: Tensor, key: Tensor, rows: slice, scale: float, softcap: float | None
) -> Tensor:
    scores = products(query, key)
    if softcap is not None:
        scores.mul_(scale / softcap).tanh_().mul_(softcap)
    count = rows.stop - rows.start
    later = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu_(1)
    scores[..., rows.start :].masked_fill_(later, -torch.inf)
    return scores


def _blocks(heads: int, size: int) -> Iterator[slice]:
    """Deal queries to blocks with at most `SCORES` scores; one query at least."""
    start = 0
    while start < size:
        # n with n * (start + n) keys and heads
        room = max(1, (isqrt(start * start + 4 * (SCORES // heads)) - start) // 2)
        count = min(ROWS, room if room < ALIGNED else room // ALIGNED * ALIGNED)
        yield slice(start, min(start + count, size))
        start += count


def factor(states: Tensor) -> Tensor:
    """``states`` as `products` takes them: once for many products."""
    return states if states.is_cuda and states.dtype.itemsize == 2 else states.float()


def products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products ``[H, R, S]`` float32 of ``left [H, R, D]`` with ``right [G, S, D]``.

    Numbers of 16 bits are multiplied as they are on a GPU: what is summed in float32 is exact.
    """
    heads, count, dim = left.shape
    left, right = factor(left), factor(right)
    rows = left.reshape(right.shape[0], -1, dim)  # queries of a K/V head's heads side by side
    if left.dtype == right.dtype and left.dtype != torch.float32:
        found = torch.bmm(rows, right.mT, out_dtype=torch.float32)
    else:
        found = rows.float() @ right.float().mT
    return found.view(heads, count, right.shape[1])


def gradient_costs(
    bands: Bands, value: Tensor, gradient: Tensor, offsets: Sequence[Tensor]
) -> list[PairCosts]:
    """Sums over queries of ``(g_h . (O_hr - O_h))^2``, for every w; one entry without a window.

    O_hr is what head h puts out with r's scores, or with local keys only. The square of the
    first-order change of the loss, summed over tokens, is twice the rise that a quadratic model
    of the loss predicts where its curvature is the (empirical) Fisher information.

    Args:
        bands: of R queries.
        value: ``[G, S, Dv]``.
        gradient: ``[H, R, Dv]`` of the summed loss with respect to each head's output.
        offsets: ``[H (h), H (r)]`` for every w.
    """
    # what one more unit of probability on a key does to the loss
    slope = products(gradient, value[:, : bands.rows.stop])  # [H, R, S]
    used = []
    for band in bands.bands:
        part = slope[..., band.keys].permute(1, 2, 0)
        found = band.weights.permute(1, 0, 2) @ part
        used.append(found.div_(band.total.T[:, :, None]))  # [R, r, h]
    own = [part.diagonal(dim1=1, dim2=2) for part in used]  # [R, h]
    lse = [band.lse.T for band in bands.bands]  # [R, H]
    if not bands.local:
        return [PairCosts((used[0] - own[0][:, None, :]).square().sum(0).T, None)]
    local = _merged(own, lse)
    far = _merged(used[::-1], lse[::-1])[::-1]
    whole = local[-1][0]  # [R, h]
    costs = []
    for count, offset in zip(bands.local, offsets, strict=True):
        (at_local, local_lse), (at_far, far_lse) = local[count - 1], far[count]
        share = _far_share(local_lse, far_lse, offset)  # [R, r, h]
        kept = at_local[:, None, :]
        change = kept + share * (at_far - kept) - whole[:, None, :]
        costs.append(PairCosts(change.square().sum(0).T, (at_local - whole).square().sum(0)))
    return costs


def value_costs(bands: Bands, value: Tensor, offsets: Sequence[Tensor]) -> list[PairCosts]:
    """Sums over queries of ``|O_hr - O_h|^2``, for every w; one entry without a window.

    Args:
        bands: of R queries.
        value: ``[H, S, E]``, V times a square root of ``W_O W_O^T`` of its head, which makes the
            norm that of the layer's output. Nothing is copied if it lies token by token.
        offsets: ``[H (h), H (r)]`` for every w.
    """
    heads, rows = bands.bands[0].lse.shape
    own = [
        (band.weights @ value[:, band.keys]).div_(band.total[..., None]).transpose(0, 1)
        for band in bands.bands
    ]  # [R, h, E]
    lse = [band.lse.T for band in bands.bands]  # [R, H]
    local = _merged(own, lse)
    whole = local[-1][0]
    shares = [
        _far_share(local[count - 1][1], far_lse.T, offset)
        for count, (_, far_lse), offset in zip(
            bands.local, bands.local_and_far_lse(), offsets, strict=True
        )
    ]
    columns = [
        value[:, band.keys].transpose(0, 1).reshape(-1, heads * value.shape[-1])
        for band in bands.bands
    ]  # [n, H * E]
    sharing: list[list[Tensor]] = [[] for _ in shares or (None,)]
    for other in range(heads):
        used = [
            (band.weights[other] @ part).div_(band.total[other][:, None]).view(rows, heads, -1)
            for band, part in zip(bands.bands, columns, strict=True)
        ]  # [R, h, E]
        if not shares:
            sharing[0].append((used[0] - whole).square().sum((0, 2)))
            continue
        far = _merged(used[::-1], [part[:, other] for part in lse[::-1]])[::-1]
        for number, count in enumerate(bands.local):
            kept = local[count - 1][0]
            output = kept + shares[number][:, other, :, None] * (far[count][0] - kept)
            sharing[number].append((output - whole).square().sum((0, 2)))
    if not bands.local:
        return [PairCosts(torch.stack(sharing[0], dim=1), None)]
    return [
        PairCosts(torch.stack(part, dim=1), (local[count - 1][0] - whole).square().sum((0, 2)))
        for part, count in zip(sharing, bands.local, strict=True)
    ]


def _far_share(local_lse: Tensor, far_lse: Tensor, offset: Tensor) -> Tensor:
    """``[R, r, h]``: weight of head r's far part in head h's output.

    Args:
        local_lse: ``[R, h]``.
        far_lse: ``[R, r]``.
        offset: ``[H (h), H (r)]``.
    """
    return torch.sigmoid(far_lse[:, :, None] + offset.T - local_lse[:, None, :])


def _merged(parts: Sequence[Tensor], lse: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Outputs over the keys of the first, the first two, ... bands, with their log-sum-exp.

    Args:
        parts: ``[R, ...]`` outputs over the keys of each band alone.
        lse: of each, of the shape that its parts begin with.
    """
    found = [(parts[0], lse[0])]
    for part, more in zip(parts[1:], lse[1:], strict=True):
        before, known = found[-1]
        total = torch.logaddexp(known, more)
        share = (more - total).exp().nan_to_num(0.0)  # neither has a key: 0
        share = share.view(*share.shape, *(1,) * (part.ndim - share.ndim))
        found.append((before + share * (part - before), total))
    return found
