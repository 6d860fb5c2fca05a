"""Parts common to all decode kernels: scores, memberships, sizes of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from chai_attention.ops.triton.sizes import power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores_base2(s, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of log2, softcap applied."""
    if HAS_SOFTCAP:
        # tanh from exp2, which saturates without overflow; near 0, where 1 - e would lose digits,
        # from its series
        x = s / softcap
        e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
        far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        y = x * x
        series = 1 - y * (1 / 3 - y * (2 / 15 - y * (17 / 315 - y * (62 / 2835))))
        s = softcap * tl.where(tl.abs(x) < 0.25, x * series, far)
    return s * LOG2_E


@triton.jit
def _membership_of(row, ids_ptr, stride_t, HAS_IDS: tl.constexpr):
    """Where the tables of a sequence begin; ``stride_t`` is 0 where all share one row."""
    if HAS_IDS:
        row = tl.load(ids_ptr + row).to(tl.int64)
    return row * stride_t


def padded(dim: int) -> int:
    """Head size a tile is made for: a power of two, and no less than a matrix product takes."""
    return max(16, power_of_2(dim))
