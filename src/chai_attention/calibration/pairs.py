"""What it costs one head to use another's attention map, in numbers of one layer and sequence.

With an exact recent window (``recent`` > 0) a head keeps its own scores for near keys, the last w
and the first s, and uses the other head's only for far ones; the two parts are weighed by their
log-sum-exp, the far one's shifted by an offset (see `ops.windowed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 256  # queries whose maps exist at a time


@dataclass(frozen=True)
class Maps:
    """Attention maps of all heads for some queries of one sequence.

    Attributes:
        rows: which queries.
        near: ``[H, R, S]`` probabilities over near keys (over all keys without a window).
        near_lse: ``[H, R]`` log-sum-exp of near scores.
        far: ``[H, R, S]`` probabilities over far keys, zeros where there are none; None without
            a window.
        far_lse: ``[H, R]``, minus infinity where there are no far keys.
    """

    rows: slice
    near: Tensor
    near_lse: Tensor
    far: Tensor | None
    far_lse: Tensor | None

    def far_share(self, offset: Tensor) -> Tensor:
        """``[R, r, h]``: weight of head r's far part in head h's output; offset ``[H (h), H]``."""
        assert self.far_lse is not None
        far, near = self.far_lse.T, self.near_lse.T  # [R, H]
        return torch.sigmoid(far[:, :, None] + offset.T - near[:, None, :])

    def whole(self) -> Tensor:
        """``[H, R, S]``: every head's ordinary probabilities."""
        if self.far is None or self.far_lse is None:
            return self.near
        share = torch.sigmoid(self.far_lse - self.near_lse)[..., None]
        return self.near * (1 - share) + self.far * share


def maps_of(
    query: Tensor,
    key: Tensor,
    scale: float,
    softcap: float | None,
    recent: int = 0,
    sinks: int = 0,
) -> Iterator[Maps]:
    """Causal maps of ``query [H, S, D]`` over ``key [G, S, D]``, some queries at a time."""
    heads, size, _ = query.shape
    keys = key.float().repeat_interleave(heads // key.shape[0], dim=0)
    position = torch.arange(size, device=query.device)
    for start in range(0, size, ROWS):
        rows = slice(start, min(start + ROWS, size))
        seen = position[: rows.stop]
        scores = query[:, rows].float() @ keys[:, : rows.stop].mT * scale  # [H, R, S]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        behind = position[rows, None] - seen  # [R, S]
        scores = scores.masked_fill(behind < 0, -torch.inf)
        if not recent:
            yield Maps(rows, torch.softmax(scores, -1), scores.logsumexp(-1), None, None)
            continue
        is_near = (behind < recent) | (seen < sinks)
        near = scores.masked_fill(~is_near, -torch.inf)
        far = scores.masked_fill(is_near, -torch.inf)
        yield Maps(
            rows,
            torch.softmax(near, -1),
            near.logsumexp(-1),
            torch.softmax(far, -1).nan_to_num(0.0),
            far.logsumexp(-1),
        )


def gradient_cost(maps: Maps, value: Tensor, gradient: Tensor, offset: Tensor) -> Tensor:
    """Sum over queries of ``(g_h . (O_hr - O_h))^2``: ``[H (h), H (r)]``.

    O_hr is what head h puts out with r's scores. The square of the first-order change of the
    loss, summed over tokens, is twice the rise that a quadratic model of the loss predicts where
    its curvature is the (empirical) Fisher information.

    Args:
        maps: of R queries.
        value: ``[H, S, Dv]``.
        gradient: ``[H, R, Dv]`` of the summed loss with respect to each head's output.
        offset: ``[H (h), H (r)]``.
    """
    # what one more unit of probability on a key does to the loss
    slope = gradient @ value[:, : maps.near.shape[-1]].mT  # [H, R, S]
    by_key = slope.permute(1, 2, 0)  # [R, S, h]
    own = (maps.whole() * slope).sum(-1).T  # [R, h]
    if maps.far is None:
        change = maps.near.permute(1, 0, 2) @ by_key  # [R, r, h]
    else:
        share = maps.far_share(offset)
        near = (maps.near * slope).sum(-1).T[:, None, :]  # [R, 1, h]
        change = near + share * (maps.far.permute(1, 0, 2) @ by_key - near)
    return (change - own[:, None, :]).square().sum(0).T


def value_cost(maps: Maps, value: Tensor, offset: Tensor) -> Tensor:
    """Sum over queries of ``|O_hr - O_h|^2``: ``[H (h), H (r)]``.

    Args:
        maps: of R queries.
        value: ``[H, S, E]``, V times a square root of ``W_O W_O^T`` of its head, which makes the
            norm that of the layer's output.
        offset: ``[H (h), H (r)]``.
    """
    heads, rows, seen = maps.near.shape
    columns = value[:, :seen].transpose(0, 1).reshape(seen, -1)  # [S, H * E]
    own = (maps.whole() @ value[:, :seen]).transpose(0, 1)  # [R, h, E]
    near = own if maps.far is None else (maps.near @ value[:, :seen]).transpose(0, 1)
    share = None if maps.far is None else maps.far_share(offset)  # [R, r, h]
    cost = []
    for other in range(heads):
        used = maps.near if maps.far is None else maps.far
        output = (used[other] @ columns).view(rows, heads, -1)  # [R, h, E]
        if share is not None:
            output = near + share[:, other, :, None] * (output - near)
        cost.append((output - own).square().sum((0, 2)))
    return torch.stack(cost, dim=1)
