"""Compare a result with the definition in float64, before any time is reported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chai_attention.benchmarking.cases import BenchmarkError
from chai_attention.benchmarking.clustered import Inputs, Layout
from chai_attention.membership import Membership
from chai_attention.ops import reference

ROWS = 8  # queries of each of the three stretches that are compared
# relative errors of logits that rounding alone brings about in a deep model
ROUNDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class WrongResultError(BenchmarkError):
    """Something computed a wrong result, so nothing is reported."""


class Accuracy(NamedTuple):
    """How far a result is from float64.

    Attributes:
        error: largest difference.
        allowed: twice what torch's own attention loses in the same dtype on the same inputs, and
            four units of rounding.
    """

    error: float
    allowed: float

    @property
    def is_correct(self) -> bool:
        """Whether it is within bounds; NaN is not."""
        return self.error <= self.allowed


def accuracy(out: Tensor, inputs: Inputs, member: Membership, layout: Layout) -> Accuracy:
    """Compare some rows of ``out [B, Q, H, D]`` with the float64 definition.

    The first, middle and last queries of the first and the last sequence are compared.

    Args:
        out: the result.
        inputs: Q, K and V of all heads.
        member: of B rows.
        layout: says whether there is an exact recent window.
    """
    parts: list[Accuracy] = []
    queries, size = inputs.query.shape[2], inputs.key.shape[2]
    for row in sorted({0, inputs.query.shape[0] - 1}):
        one = member.select(torch.tensor([row], device=out.device))
        for start, stop in _stretches(queries):
            part = Inputs(
                inputs.query[row : row + 1, :, start:stop],
                *(x[row : row + 1, :, : size - queries + stop] for x in inputs[1:]),
            )
            parts.append(_compare(out[row : row + 1, start:stop], part, one, layout))
    wrong = [part for part in parts if not part.is_correct]
    return wrong[0] if wrong else max(parts, key=lambda part: part.error / part.allowed)


def require_correct(name: str, found: Accuracy) -> Accuracy:
    """Return what was found.

    Raises:
        WrongResultError: it is not within bounds.
    """
    if not found.is_correct:
        raise WrongResultError(
            f"{name} is wrong: off by {found.error:.2g} where {found.allowed:.2g} is allowed; "
            "nothing is reported"
        )
    return found


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm())


def _stretches(queries: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of a few queries at the start, in the middle and at the end."""
    starts = {0, max(0, queries // 2 - ROWS // 2), max(0, queries - ROWS)}
    for start in sorted(starts):
        yield start, min(start + ROWS, queries)


def _compare(out: Tensor, inputs: Inputs, member: Membership, layout: Layout) -> Accuracy:
    """Compare all rows of one sequence, head by head: K and V in float64 may be many gigabytes."""
    found = [_compare_head(out, inputs, member, layout, head) for head in range(member.heads)]
    error, loss = (max(pair) for pair in zip(*found, strict=True))
    if any(math.isnan(one) for one, _ in found):
        error = math.nan
    return Accuracy(error, 2 * loss + 4 * torch.finfo(inputs.query.dtype).eps)


def _compare_head(
    out: Tensor, inputs: Inputs, member: Membership, layout: Layout, head: int
) -> tuple[float, float]:
    """How far one head is off, and what torch's attention loses on its inputs."""
    rep, group = int(member.representatives[0, head]), member.group_size
    own = slice(head // group, head // group + 1)
    key = inputs.key[:, rep // group : rep // group + 1]
    shared = Inputs(inputs.query[:, rep : rep + 1], key, inputs.value[:, own])
    mask = reference.visible(
        1, inputs.query.shape[2], inputs.key.shape[2], None, None, inputs.query.device
    )
    plain, low = (
        F.scaled_dot_product_attention(x.query, x.key, x.value, attn_mask=mask)
        for x in (_double(shared), shared)
    )
    want = plain.transpose(1, 2)
    if layout.recent:
        # the head and its representative alone
        pair = [head] if rep == head else [rep, head]
        alone = Membership.from_representatives(
            torch.zeros(1, len(pair), dtype=torch.long, device=out.device),
            streaming=[0] if head in member.streaming else [],
        )
        kv = [one // group for one in pair]
        exact = Inputs(inputs.query[:, pair], inputs.key[:, kv], inputs.value[:, kv])
        want = reference.recent_attention(
            *_double(exact), alone, recent=layout.recent, sinks=layout.sinks, scale=inputs.scale
        )[:, :, -1:]
    error = (out[:, :, head : head + 1].double() - want).abs().max().item()
    return error, (low.double() - plain).abs().max().item()


def _double(inputs: Inputs) -> Inputs:
    return Inputs(*(x.double() for x in inputs))
