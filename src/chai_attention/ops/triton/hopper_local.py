"""Local keys in prefill on Hopper GPUs: how they come, and attention to them, after the far ones.

The online softmax of the far keys, whose scores are the representative's, goes on for every member
with its own Q and K over the sinks and the band of its last keys. Both halves of a tile see bands
that are shifted by `ROWS` keys, so that each leaves out one of the band's blocks.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from chai_attention.ops.triton.hopper import update
from chai_attention.ops.triton.hopper_fetch import _fetch_tile, barrier, release

BOX = gl.constexpr(16)  # tokens that pages are made of
SINKS_MOST = gl.constexpr(16)  # sinks are a block of so many keys; more have no kernel here


@gluon.jit
def halves(acc, M: gl.constexpr, layout: gl.constexpr):
    """Both members' columns of the outputs ``[rows, M * D]``; of one member the same twice."""
    if M > 1:
        rows: gl.constexpr = acc.shape[0]
        width: gl.constexpr = acc.shape[1]
        low, high = gl.split(acc.reshape([rows, 2, width // 2]).permute([0, 2, 1]))
        low = gl.convert_layout(low, layout)
        high = gl.convert_layout(high, layout)
    else:
        low = acc
        high = acc
    return low, high


@gluon.jit
def blank(v, first, stop, EACH: gl.constexpr):
    """Zeros in place of V but for the tokens from ``first`` on and before ``stop`` of a block.

    Other sequences' V stands there, or anything: their weights are 0, but 0 times NaN is not.
    ``EACH`` tokens are in registers at a time.
    """
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = gl.arange(0, EACH, layout=gl.SliceLayout(1, spread))
    for part in gl.static_range(v.shape[0] // EACH):
        rows = v.slice(part * EACH, EACH)
        here = rows.load(spread)
        keep = (token + part * EACH >= first) & (token + part * EACH < stop)
        rows.store(gl.where(keep[:, None], here, gl.zeros_like(here)))
    fence_async_shared()
    barrier()


@gluon.jit
def _continue(
    q, k, v, acc, best, weight, seen, factor, DTYPE: gl.constexpr
):  # fmt: skip
    """Go on with the softmax over keys of which each query sees those ``seen``."""
    KEYS: gl.constexpr = k.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    weights: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    out_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    zero = gl.full([acc.shape[0], KEYS], 0.0, gl.float32, layout=layout)
    s = warpgroup_mma(q, k, zero, use_acc=False)
    s = gl.where(seen, s, float("-inf"))
    p, old, best, weight = update(
        s, gl.convert_layout(best, by_row), gl.convert_layout(weight, by_row), factor
    )
    acc = acc * gl.convert_layout(old, out_row)[:, None]
    acc = warpgroup_mma(gl.convert_layout(p.to(DTYPE), weights), v, acc)
    return acc, best, weight


@gluon.jit
def attend_local(
    HALF: gl.constexpr, q, k_all, v_one, full, free, acc, best, weight, done, position, past,
    recent, blocks, size, factor,
    BLOCK: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, SINKS: gl.constexpr,
    RAGGED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One member's local keys: sums, maximum and weight, and the number of stages used so far.

    ``position`` are the queries' positions, ``past`` that of the tile's first query; ``blocks``
    of the band's keys are fetched, all but one of which a half sees. RAGGED: what stands before
    the first key and behind the last of ``size`` is not this sequence's.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    if SINKS > 0:
        few: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SINKS_MOST, 16])
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        if RAGGED:  # noqa: SIM102 - known when compiled
            if size < SINKS_MOST:
                blank(v_one.index(stage * M), 0, size, BLOCK)
        sink = gl.arange(0, SINKS_MOST, layout=gl.SliceLayout(0, few))
        here = gl.convert_layout(position, gl.SliceLayout(1, few))
        acc, best, weight = _continue(
            q, k_all.index(stage).slice(0, SINKS_MOST).permute([1, 0]),
            v_one.index(stage * M).slice(0, SINKS_MOST), acc, best, weight,
            (sink < SINKS)[None, :] & (sink[None, :] <= here[:, None]), factor, DTYPE,
        )  # fmt: skip
        best = gl.convert_layout(best, by_row)
        weight = gl.convert_layout(weight, by_row)
        release(free.index(stage))
        done += 1
    if HALF == 1:
        leave(full, free, done, STAGES)
        done += 1
    first = past - recent + 1 + HALF * BLOCK
    for n in range(0, blocks - 1):
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        begin = first + n * BLOCK
        if RAGGED:  # noqa: SIM102 - known when compiled
            if (begin < 0) | (begin + BLOCK > size):
                blank(v_one.index(stage * M), -begin, size - begin, BLOCK)
        at = begin + gl.arange(0, BLOCK, layout=by_key)
        seen = (at[None, :] <= position[:, None]) & (at[None, :] > (position - recent)[:, None])
        seen = seen & (at >= SINKS)[None, :]
        acc, best, weight = _continue(
            q, k_all.index(stage).permute([1, 0]), v_one.index(stage * M), acc, best, weight,
            seen, factor, DTYPE,
        )  # fmt: skip
        release(free.index(stage))
        done += 1
    if HALF == 0:
        leave(full, free, done, STAGES)
        done += 1
    return acc, best, weight, done


@gluon.jit
def leave(full, free, done, STAGES: gl.constexpr):
    """Let a stage pass that this half does not need; it must have been filled first."""
    mbarrier.wait(full.index(done % STAGES), (done // STAGES) & 1)
    release(free.index(done % STAGES))


@gluon.jit
def fetch_local(
    k_tiles, v_tiles, k_one, v_one, full, free, done, outer, head, column, sink, blocks,
    BLOCK: gl.constexpr, D: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    SINKS: gl.constexpr,
):  # fmt: skip
    """Bring the blocks that `attend_local` takes: the sinks', then the band from ``column`` on."""
    BYTES: gl.constexpr = 2 * BLOCK * D * 2
    for n in range(0, blocks + (1 if SINKS > 0 else 0)):
        at = column + n * BLOCK
        if SINKS > 0:
            at = gl.where(n == 0, sink, at - BLOCK)
        stage = done % STAGES
        bar = full.index(stage)
        mbarrier.wait(free.index(stage), ((done // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        _fetch_tile(k_tiles, [outer, head, at, 0], bar, k_one.index(stage))
        _fetch_tile(v_tiles, [outer, head, at, 0], bar, v_one.index(stage * M))
        done += 1
    return done
