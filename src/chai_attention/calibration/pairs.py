"""What it costs one head to use another's attention map, or to see near keys only.

Numbers of one layer and sequence. With an exact recent window a head keeps its own scores for near
keys, the last w and the first s, and uses the other head's only for far ones; the two parts are
weighed by their log-sum-exp, the far one's shifted by an offset (see `ops.windowed`). A streaming
head has no far part.

Windows of several w are told from one set of maps: keys are cut into bands by their distance, so
that what is near and what is far to each w are runs of bands, merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

ROWS = 256  # queries whose maps exist at a time


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
        scores: ``[H, R, n]``, minus infinity for keys that are not of a query's band.
    """

    keys: slice
    scores: Tensor

    @cached_property
    def map(self) -> Tensor:
        """``[H, R, n]`` probabilities over the band, zeros for queries that have no key in it."""
        return torch.softmax(self.scores, -1).nan_to_num(0.0)

    @cached_property
    def lse(self) -> Tensor:
        """``[H, R]`` log-sum-exp of the scores, minus infinity for queries without a key."""
        return self.scores.logsumexp(-1)


@dataclass(frozen=True)
class Bands:
    """Scores of all heads for some queries of one sequence, cut into bands.

    Attributes:
        rows: which queries.
        bands: the first keys if there are sinks, then from the nearest to the farthest.
        near: for every w, ascending, how many bands at the beginning are near.
    """

    rows: slice
    bands: tuple[Band, ...]
    near: tuple[int, ...]

    def near_and_far_lse(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For every w, log-sum-exp of near and of far scores, ``[H, R]`` each."""
        lse = torch.stack([band.lse for band in self.bands])
        for count in self.near:
            yield lse[:count].logsumexp(0), lse[count:].logsumexp(0)


@dataclass(frozen=True)
class PairCosts:
    """Costs of a layer, summed over queries.

    Attributes:
        sharing: ``[H (h), H (r)]``, of head h using head r's scores.
        streaming: ``[H]``, of a head seeing near keys only; None without a window.
    """

    sharing: Tensor
    streaming: Tensor | None


def maps_of(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Iterator[Maps]:
    """Causal maps of ``query [H, S, D]`` over ``key [G, S, D]``, some queries at a time."""
    for rows, scores, _ in _scores(query, key, scale, softcap):
        yield Maps(rows, torch.softmax(scores, -1))


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
    near = tuple(range(1 + bool(sinks), 1 + bool(sinks) + len(recents)))
    for rows, scores, behind in _scores(query, key, scale, softcap):
        seen = rows.stop
        bands = [] if recents else [Band(slice(0, seen), scores)]
        if recents and sinks:
            first = slice(0, min(sinks, seen))
            bands.append(Band(first, scores[..., first]))
        for low, high in pairwise(bounds):
            # at least one key, which the mask hides where the band has none
            start = min(max(sinks, rows.start - high + 1), seen - 1)
            keys = slice(start, max(seen - low, start + 1))
            distance = behind[:, keys]
            inside = (distance >= low) & (distance < high)
            inside[:, : max(0, sinks - start)] = False
            bands.append(Band(keys, scores[..., keys].masked_fill(~inside, -torch.inf)))
        yield Bands(rows, tuple(bands), near)


def _scores(
    query: Tensor, key: Tensor, scale: float, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Queries, their causal scores ``[H, R, S]``, and how far behind them keys are ``[R, S]``."""
    heads, size, _ = query.shape
    keys = key.float().repeat_interleave(heads // key.shape[0], dim=0)
    position = torch.arange(size, device=query.device)
    for start in range(0, size, ROWS):
        rows = slice(start, min(start + ROWS, size))
        scores = query[:, rows].float() @ keys[:, : rows.stop].mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        behind = position[rows, None] - position[: rows.stop]
        yield rows, scores.masked_fill(behind < 0, -torch.inf), behind


def gradient_costs(
    bands: Bands, value: Tensor, gradient: Tensor, offsets: Sequence[Tensor]
) -> list[PairCosts]:
    """Sums over queries of ``(g_h . (O_hr - O_h))^2``, for every w; one entry without a window.

    O_hr is what head h puts out with r's scores, or with near keys only. The square of the
    first-order change of the loss, summed over tokens, is twice the rise that a quadratic model
    of the loss predicts where its curvature is the (empirical) Fisher information.

    Args:
        bands: of R queries.
        value: ``[H, S, Dv]``.
        gradient: ``[H, R, Dv]`` of the summed loss with respect to each head's output.
        offsets: ``[H (h), H (r)]`` for every w.
    """
    # what one more unit of probability on a key does to the loss
    slope = gradient @ value[:, : bands.rows.stop].mT  # [H, R, S]
    slopes = [slope[..., band.keys] for band in bands.bands]
    own = [
        (band.map * part).sum(-1).T for band, part in zip(bands.bands, slopes, strict=True)
    ]  # [R, h]
    used = [
        band.map.permute(1, 0, 2) @ part.permute(1, 2, 0)
        for band, part in zip(bands.bands, slopes, strict=True)
    ]  # [R, r, h]
    lse = [band.lse.T for band in bands.bands]  # [R, H]
    if not bands.near:
        return [PairCosts((used[0] - own[0][:, None, :]).square().sum(0).T, None)]
    near = _merged(own, lse)
    far = _merged(used[::-1], lse[::-1])[::-1]
    whole = near[-1][0]  # [R, h]
    costs = []
    for count, offset in zip(bands.near, offsets, strict=True):
        (at_near, near_lse), (at_far, far_lse) = near[count - 1], far[count]
        share = _far_share(near_lse, far_lse, offset)  # [R, r, h]
        kept = at_near[:, None, :]
        change = kept + share * (at_far - kept) - whole[:, None, :]
        costs.append(PairCosts(change.square().sum(0).T, (at_near - whole).square().sum(0)))
    return costs


def value_costs(bands: Bands, value: Tensor, offsets: Sequence[Tensor]) -> list[PairCosts]:
    """Sums over queries of ``|O_hr - O_h|^2``, for every w; one entry without a window.

    Args:
        bands: of R queries.
        value: ``[H, S, E]``, V times a square root of ``W_O W_O^T`` of its head, which makes the
            norm that of the layer's output.
        offsets: ``[H (h), H (r)]`` for every w.
    """
    heads, rows = bands.bands[0].lse.shape
    own = [(band.map @ value[:, band.keys]).transpose(0, 1) for band in bands.bands]  # [R, h, E]
    lse = [band.lse.T for band in bands.bands]  # [R, H]
    near = _merged(own, lse)
    whole = near[-1][0]
    shares = [
        _far_share(near[count - 1][1], far_lse.T, offset)
        for count, (_, far_lse), offset in zip(
            bands.near, bands.near_and_far_lse(), offsets, strict=True
        )
    ]
    columns = [
        value[:, band.keys].transpose(0, 1).reshape(-1, heads * value.shape[-1])
        for band in bands.bands
    ]  # [n, H * E]
    sharing: list[list[Tensor]] = [[] for _ in shares or (None,)]
    for other in range(heads):
        used = [
            (band.map[other] @ part).view(rows, heads, -1)
            for band, part in zip(bands.bands, columns, strict=True)
        ]  # [R, h, E]
        if not shares:
            sharing[0].append((used[0] - whole).square().sum((0, 2)))
            continue
        far = _merged(used[::-1], [part[:, other] for part in lse[::-1]])[::-1]
        for number, count in enumerate(bands.near):
            kept = near[count - 1][0]
            output = kept + shares[number][:, other, :, None] * (far[count][0] - kept)
            sharing[number].append((output - whole).square().sum((0, 2)))
    if not bands.near:
        return [PairCosts(torch.stack(sharing[0], dim=1), None)]
    return [
        PairCosts(torch.stack(part, dim=1), (near[count - 1][0] - whole).square().sum((0, 2)))
        for part, count in zip(sharing, bands.near, strict=True)
    ]


def _far_share(near_lse: Tensor, far_lse: Tensor, offset: Tensor) -> Tensor:
    """``[R, r, h]``: weight of head r's far part in head h's output.

    Args:
        near_lse: ``[R, h]``.
        far_lse: ``[R, r]``.
        offset: ``[H (h), H (r)]``.
    """
    return torch.sigmoid(far_lse[:, :, None] + offset.T - near_lse[:, None, :])


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
