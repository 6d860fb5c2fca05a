"""Attention to far keys in prefill with an exact window on Hopper GPUs.

`hopper_window` and `hopper_paged_window` begin with this part. It works as `hopper` does, but the
last block may belong to one half alone.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from chai_attention.ops.triton.hopper import _softmax, _step
from chai_attention.ops.triton.hopper_fetch import block_at, release
from chai_attention.ops.triton.hopper_local import BOX, blank, leave


@gluon.jit
def attend_far(
    HALF: gl.constexpr, q, k_all, v_all, v_one, full, free, turns, q_done, blocks, done, laps,
    reach, lowest, there, factor,
    ROWS: gl.constexpr, BLOCK: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    EACH: gl.constexpr, RAGGED: gl.constexpr, PAGED: gl.constexpr, LOW: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """A half's far keys, of which each query sees those up to ``reach``, at least ``lowest``.

    RAGGED: behind the first ``there`` keys stand those of other sequences, or anything. PAGED:
    queries see keys from LOW on, and blocks come as `block_at` says.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    by_key: gl.constexpr = gl.SliceLayout(0, scores)
    zero = gl.full([ROWS, BLOCK], 0.0, gl.float32, layout=scores)
    best = gl.full([ROWS], float("-inf"), gl.float32, layout=by_row)
    weight = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
    acc = gl.full([ROWS, WIDTH], 0.0, gl.float32, layout=output)
    every = blocks
    if HALF == 0:
        # the last block may be the other half's alone
        for _ in range(0, gl.where((blocks - 1) * BLOCK > lowest + ROWS - 1, 1, 0)):
            if blocks > 1:
                leave(full, free, done, STAGES)
                mbarrier.wait(turns.index(0), (laps & 1) ^ 1)
                mbarrier.arrive(turns.index(1), count=1)
                laps += 1
                done += 1
                blocks -= 1
    # every query sees the first `whole` blocks whole; not the last block, which is masked even
    # where it need not be
    whole = gl.minimum(gl.maximum(lowest + 1, 0) // BLOCK, blocks - 1)
    stage = done % STAGES
    mbarrier.wait(full.index(stage), (done // STAGES) & 1)
    s = warpgroup_mma(q, k_all.index(stage).permute([1, 0]), zero, use_acc=False)
    left = every - blocks  # by this half
    last = (blocks - 1) * BLOCK
    if PAGED:
        last = block_at(left, every, LOW) * BLOCK
    at = last + gl.arange(0, BLOCK, layout=by_key)
    p, _old, best, weight = _softmax(s, best, weight, factor, at, reach, True, LOW)
    p16 = gl.convert_layout(p.to(DTYPE), weights)
    release(free.index(stage))
    stage = (done + 1) % STAGES
    mbarrier.wait(full.index(stage), ((done + 1) // STAGES) & 1)
    if RAGGED:  # noqa: SIM102 - known when compiled
        if last + BLOCK > there:
            for part in gl.static_range(WIDTH // v_one.shape[2]):
                v = v_one.index(stage * (v_one.shape[0] // STAGES) + part)
                blank(v, 0, there - last, BOX if PAGED else BLOCK)  # few registers are free
    masked = blocks - whole
    if PAGED:
        masked = gl.minimum(blocks, masked + (1 if LOW > 0 else 0))
    for n in range(1, masked):
        acc, p16, best, weight = _step(
            HALF, q, k_all, v_all, full, free, turns, acc, p16, best, weight, laps, done + n,
            block_at(left + n, every, LOW) * BLOCK if PAGED else last - n * BLOCK, reach, factor,
            ROWS, BLOCK, STAGES, True, DTYPE, EACH, LOW,
        )  # fmt: skip
        laps += 1
    for n in range(masked, blocks):
        acc, p16, best, weight = _step(
            HALF, q, k_all, v_all, full, free, turns, acc, p16, best, weight, laps, done + n,
            0, reach, factor, ROWS, BLOCK, STAGES, False, DTYPE, EACH,
        )  # fmt: skip
        laps += 1
    release(q_done)
    stage = (done + blocks) % STAGES
    acc = warpgroup_mma(p16, v_all.index(stage * EACH), acc)
    release(free.index(stage))
    return acc, best, weight, done + blocks + 1, laps
