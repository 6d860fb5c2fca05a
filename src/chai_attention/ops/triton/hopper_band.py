"""Attention to local keys out of pages on Hopper GPUs, which comes after the far ones.

The online softmax of the far keys, whose scores are the representative's, goes on for every member
with its own Q and K over the sinks and the band of its last keys. The second half's band begins
`ROWS` keys behind the first one's, and each half leaves the blocks that only the other one sees.
`hopper_pages` brings the keys.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from chai_attention.ops.triton.hopper import update
from chai_attention.ops.triton.hopper_fetch import release
from chai_attention.ops.triton.hopper_local import BOX, SINKS_MOST, blank, leave

NEVER = gl.constexpr(1 << 29)  # keys, more than there are


@gluon.jit
def _scores(
    HALF: gl.constexpr, s, key, first, position, recent, size, v, factor, best, weight,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """`hopper.update` with a block of the band, of which the first key is ``key``."""
    if (key < first) | (key + BLOCK > size):
        blank(v, first - key, size - key, BOX)
    lowest = first + recent - 1 + HALF * ROWS  # the half's first query
    if (key + BLOCK - 1 > lowest) | (key <= lowest + ROWS - 1 - recent) | (key < SINKS):
        at = key + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s.type.layout))
        if SINKS > 0:
            at = gl.where(at >= SINKS, at, NEVER)
        behind = (position[:, None] - at[None, :]).to(gl.uint32)  # what lies ahead is far behind
        s = gl.where(behind < recent.to(gl.uint32), s, float("-inf"))
    return update(s, best, weight, factor)


@gluon.jit
def attend_band(
    HALF: gl.constexpr, q, k_all, v_one, full, free, acc, best, weight, done, position, first,
    begin, blocks, recent, size, factor,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    SINKS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One member's local keys: sums, maximum and weight, and the number of stages used so far.

    ``position`` are the queries' positions, ``first`` that of the first key that the tile's first
    query sees, which may be negative; ``begin`` and ``blocks`` are those of `band_of`. What stands
    before the band's first key and behind the last of ``size`` may be anything.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    out_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    zero = gl.full([ROWS, BLOCK], 0.0, gl.float32, layout=scores)
    if SINKS > 0:
        few: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SINKS_MOST, 16])
        few_row: gl.constexpr = gl.SliceLayout(1, few)
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        v = v_one.index(stage * M).slice(0, SINKS_MOST)
        if (SINKS < SINKS_MOST) | (size < SINKS_MOST):
            blank(v, 0, gl.minimum(size, SINKS), BOX)
        none = gl.full([ROWS, SINKS_MOST], 0.0, gl.float32, layout=few)
        sink_s = warpgroup_mma(
            q, k_all.index(stage).slice(0, SINKS_MOST).permute([1, 0]), none, use_acc=False
        )
        sink = gl.arange(0, SINKS_MOST, layout=gl.SliceLayout(0, few))
        here = gl.convert_layout(position, few_row)
        seen = (sink < SINKS)[None, :] & (sink[None, :] <= here[:, None])
        sink_p, faded, best, weight = update(
            gl.where(seen, sink_s, float("-inf")), gl.convert_layout(best, few_row),
            gl.convert_layout(weight, few_row), factor,
        )  # fmt: skip
        acc = acc * gl.convert_layout(faded, out_row)[:, None]
        acc = warpgroup_mma(gl.convert_layout(sink_p.to(DTYPE), weights), v, acc)
        best = gl.convert_layout(best, by_row)
        weight = gl.convert_layout(weight, by_row)
        release(free.index(stage))
        done += 1
    # the second half's band begins ROWS keys behind the first one's, and goes on as far
    early = 0
    late = blocks
    if HALF == 1:
        early = gl.minimum(gl.where(first < 0, 0, ROWS // BLOCK), blocks)
    else:
        late = gl.minimum((first + recent - 1 + ROWS - begin + BLOCK - 1) // BLOCK, blocks)
    for n in range(0, early):
        leave(full, free, done + n, STAGES)
    if late > early:
        stage = (done + early) % STAGES
        mbarrier.wait(full.index(stage), ((done + early) // STAGES) & 1)
        s = warpgroup_mma(q, k_all.index(stage).permute([1, 0]), zero, use_acc=False)
        p, old, best, weight = _scores(
            HALF, s, begin + early * BLOCK, first, position, recent, size, v_one.index(stage * M),
            factor, best, weight, ROWS, BLOCK, SINKS,
        )  # fmt: skip
        acc = acc * gl.convert_layout(old, out_row)[:, None]
        p16 = gl.convert_layout(p.to(DTYPE), weights)
        for n in range(early + 1, late):
            # scores of a block together with the product of the one before
            now = (done + n) % STAGES
            mbarrier.wait(full.index(now), ((done + n) // STAGES) & 1)
            s_later = warpgroup_mma(
                q, k_all.index(now).permute([1, 0]), zero, use_acc=False, is_async=True
            )
            acc_later = warpgroup_mma(p16, v_one.index(stage * M), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_later])
            p, old, best, weight = _scores(
                HALF, s, begin + n * BLOCK, first, position, recent, size, v_one.index(now * M),
                factor, best, weight, ROWS, BLOCK, SINKS,
            )  # fmt: skip
            # it is there already: as in `hopper._step`, the loop in this wait keeps ptxas from
            # moving the next one, for the product, in front of the softmax
            mbarrier.wait(full.index(now), ((done + n) // STAGES) & 1)
            acc, p16, p, old = warpgroup_mma_wait(0, deps=[acc_later, p16, p, old])
            release(free.index(stage))
            acc = acc * gl.convert_layout(old, out_row)[:, None]
            p16 = gl.convert_layout(p.to(DTYPE), weights)
            stage = now
        acc = warpgroup_mma(p16, v_one.index(stage * M), acc)
        release(free.index(stage))
    for n in range(late, blocks):
        leave(full, free, done + n, STAGES)
    return acc, best, weight, done + blocks
