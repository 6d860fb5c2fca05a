"""A number handed from one warp to a warpgroup through an mbarrier, and nothing else.

    compute-sanitizer --tool racecheck python benchmarks/racecheck_control.py

What racecheck reports here is about the pattern itself, not about how the Hopper prefill kernel
uses it: the writer waits for "free", writes, has its warp meet and arrives at "full" with the bytes
of a copy that the copy engine counts down; the readers wait for "full", read, meet and arrive at
"free".
"""

# Kernels are Triton's language in Python's syntax.

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from chai_attention.ops.triton.hopper_fetch import _fetch_tile, barrier, tell, told

ROUNDS, SIZE = 20, 64


@gluon.jit
def _write(tiles, tile, item, full, free, rounds):
    for turn in range(rounds):
        mbarrier.wait(free, (turn & 1) ^ 1)
        tell(item, (turn,))  # and its warp meets
        mbarrier.expect(full, tiles.block_type.nbytes)
        _fetch_tile(tiles, [0, 0], full, tile)


@gluon.jit
def _read(item, full, free, out_ptr, rounds):
    for turn in range(rounds):
        mbarrier.wait(full, turn & 1)
        number = told(item, 0)
        gl.store(out_ptr + turn, number)
        barrier()
        mbarrier.arrive(free, count=1)


@gluon.jit
def hand_over(tiles, out_ptr, rounds):
    """Write ``0 .. rounds - 1`` to ``out_ptr``, each read from shared memory."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile = gl.allocate_shared_memory(tiles.dtype, tiles.block_type.shape, tiles.layout)
    item = gl.allocate_shared_memory(gl.int32, [1, 1], shared)
    full = gl.allocate_shared_memory(gl.int64, [1], bar)
    free = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(full, count=1)
    mbarrier.init(free, count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_read, (item, full, free, out_ptr, rounds)),
        (_write, (tiles, tile, item, full, free, rounds)),
    ], [1], [24])  # fmt: skip


def main() -> None:
    """Run it and check the numbers."""
    source = torch.zeros(SIZE, SIZE, dtype=torch.bfloat16, device="cuda")
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tiles = TensorDescriptor(source, [SIZE, SIZE], [SIZE, 1], [SIZE, SIZE], layout)
    out = torch.full((ROUNDS,), -1, dtype=torch.int32, device="cuda")
    hand_over[(1,)](tiles, out, ROUNDS, num_warps=4)
    assert out.tolist() == list(range(ROUNDS))
    print(f"{ROUNDS} numbers came over")


if __name__ == "__main__":
    main()
