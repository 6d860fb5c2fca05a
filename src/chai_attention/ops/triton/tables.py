"""The tables of a membership that was found on the GPU, written by the program that found it.

Made in PyTorch, the tables that attention reads take dozens of launches. Here the representatives
are still in registers.
"""

from __future__ import annotations

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from chai_attention.membership import Membership
from chai_attention.ops.triton.chunks import Chunks


@jit
def write_membership(long_ptr, rep, slot, place, row, batch, head, real, heads, clusters):
    """Write the tables of `Membership`, one after the other as `membership_memory` has them."""
    all_heads = batch * heads
    at = row * heads
    tl.store(long_ptr + at + head, rep.to(tl.int64), mask=real)
    tl.store(long_ptr + all_heads + at + head, slot.to(tl.int64), mask=real)
    tl.store(long_ptr + 2 * all_heads + at + head, place.to(tl.int64), mask=real)
    tl.store(long_ptr + 3 * all_heads + at + place, head.to(tl.int64), mask=real)
    slot_heads = long_ptr + 4 * all_heads + row * clusters
    tl.store(slot_heads + slot, head.to(tl.int64), mask=real & (rep == head))
    # cluster c begins behind the heads of all slots before it; the last entry is all heads
    offsets = long_ptr + 4 * all_heads + batch * clusters + row * (clusters + 1)
    behind = tl.sum((slot[None, :] < head[:, None]).to(tl.int32), axis=1)
    tl.store(offsets + head, behind.to(tl.int64), mask=head < clusters)
    tl.store(offsets + clusters, tl.sum(real.to(tl.int64), axis=0))


@jit
def slots_of(rep, head, real, HP: tl.constexpr):
    """Of every head: its slot, its place within the cluster, and its place in `order`."""
    chosen = ((rep == head) & real).to(tl.int32)
    slot = tl.sum(tl.where(head[None, :] < rep[:, None], chosen[None, :], 0), axis=1)
    slot = tl.where(real, slot, HP)
    same = (slot[None, :] == slot[:, None]) & (head[None, :] < head[:, None])
    inside = tl.sum(same.to(tl.int32), axis=1)
    before = tl.sum((slot[None, :] < slot[:, None]).to(tl.int32), axis=1)
    return slot, inside, before + inside


@jit
def write_chunks(
    int_ptr, rep, slot, inside, place, row, batch, head, real, count,
    M: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the tables of `Chunks` for M members, as `chunk_memory` has them."""
    line, lane = batch * count, batch * count * M
    at = tl.arange(0, LANES)
    for table in tl.static_range(3):
        tl.store(int_ptr + table * line + row * count + at, -1, mask=at < count)
    for table in tl.static_range(2):
        lanes = int_ptr + 3 * line + table * lane + row * count * M
        tl.store(lanes + at, -1, mask=at < count * M)
    tl.debug_barrier()  # other threads of the program write over it
    # a head that stands first in its chunk counts that chunk
    opens = (inside % M == 0) & real
    chunk = tl.sum(((slot[None, :] < slot[:, None]) & opens[None, :]).to(tl.int32), axis=1)
    chunk += inside // M
    at = row * count + chunk
    tl.store(int_ptr + at, slot, mask=opens)
    tl.store(int_ptr + line + at, rep, mask=opens)
    tl.store(int_ptr + 2 * line + at, slot, mask=opens)
    at = at * M + inside % M
    tl.store(int_ptr + 3 * line + at, head, mask=real)
    tl.store(int_ptr + 3 * line + lane + at, place, mask=real)


def membership_memory(
    batch: int, heads: int, clusters: int, device: torch.device
) -> tuple[Tensor, Membership]:
    """Memory for `write_membership`, and the multi-head membership that reads it."""
    sizes = [batch * heads] * 4 + [batch * clusters, batch * (clusters + 1)]
    memory = torch.empty(sum(sizes), dtype=torch.long, device=device)
    tables = [part.view(batch, -1) for part in memory.split(sizes)]
    names = ("slot", "value_slot", "order", "slot_heads", "offsets")
    made = dict(zip(names, tables[1:], strict=True))
    return memory, Membership.from_tables(tables[0], clusters, **made)


def chunk_memory(
    batch: int, heads: int, clusters: int, members: int, device: torch.device
) -> tuple[Tensor, Chunks]:
    """Memory for `write_chunks`, and the chunks that read it."""
    count = clusters + (heads - clusters) // members
    line, lane = batch * count, batch * count * members
    sizes = [line, line, line, lane, lane]
    memory = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    slot, query, key, head, value = memory.split(sizes)
    shape = (batch, count)
    return memory, Chunks(
        slot.view(shape), query.view(shape), key.view(shape),
        head.view(*shape, members), value.view(*shape, members),
    )  # fmt: skip
