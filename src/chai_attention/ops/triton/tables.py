"""The tables of a membership that lives on the GPU, in one launch instead of dozens."""

from __future__ import annotations

# Kernels are Triton's language in Python's syntax: only their launchers have types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HEADS = 128


@triton.jit
def _slots(rep_ptr, row, head, real, heads, HP: tl.constexpr):
    """Of every head: representative, slot, and how many heads stand before it in `order`."""
    rep = tl.load(rep_ptr + row * heads + head, mask=real, other=HP).to(tl.int32)
    chosen = ((rep == head) & real).to(tl.int32)
    slot = tl.sum(tl.where(head[None, :] < rep[:, None], chosen[None, :], 0), axis=1)
    slot = tl.where(real, slot, HP)
    same = (slot[None, :] == slot[:, None]) & real[None, :]
    inside = tl.sum((same & (head[None, :] < head[:, None])).to(tl.int32), axis=1)
    before = tl.sum((slot[None, :] < slot[:, None]).to(tl.int32), axis=1)
    return rep, slot, inside, before + inside


@triton.jit
def _columns(rep_ptr, order_ptr, slot_ptr, value_slot_ptr, slot_heads_ptr, offsets_ptr,
             heads, clusters, HP: tl.constexpr):  # fmt: skip
    """The tables of `Membership` in multi-head attention."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HP)
    real = head < heads
    rep, slot, _inside, place = _slots(rep_ptr, row, head, real, heads, HP)
    tl.store(slot_ptr + row * heads + head, slot.to(tl.int64), mask=real)
    tl.store(value_slot_ptr + row * heads + head, place.to(tl.int64), mask=real)
    tl.store(order_ptr + row * heads + place, head.to(tl.int64), mask=real)
    tl.store(slot_heads_ptr + row * clusters + slot, head.to(tl.int64), mask=real & (rep == head))
    # cluster c begins behind the heads of all slots before it; the last entry is all heads
    behind = tl.sum((slot[None, :] < head[:, None]).to(tl.int32), axis=1)
    tl.store(offsets_ptr + row * (clusters + 1) + head, behind.to(tl.int64), mask=head < clusters)
    tl.store(offsets_ptr + row * (clusters + 1) + clusters, heads.to(tl.int64))


@triton.jit
def _deal(rep_ptr, slot_ptr, query_ptr, key_ptr, head_ptr, value_ptr, heads, count,
          M: tl.constexpr, HP: tl.constexpr):  # fmt: skip
    """The tables of `Chunks` in multi-head attention; they hold -1 before."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HP)
    real = head < heads
    rep, slot, inside, place = _slots(rep_ptr, row, head, real, heads, HP)
    # a head that stands first in its chunk counts that chunk
    opens = (inside % M == 0) & real
    chunk = tl.sum(((slot[None, :] < slot[:, None]) & opens[None, :]).to(tl.int32), axis=1)
    chunk += inside // M
    lane = (row * count + chunk) * M + inside % M
    tl.store(head_ptr + lane, head, mask=real)
    tl.store(value_ptr + lane, place, mask=real)
    tl.store(slot_ptr + row * count + chunk, slot, mask=opens)
    tl.store(key_ptr + row * count + chunk, slot, mask=opens)
    tl.store(query_ptr + row * count + chunk, rep, mask=opens)


def membership_tables(representatives: Tensor, clusters: int) -> dict[str, Tensor]:
    """Return the tables of a multi-head `Membership` by the names it has them under.

    Args:
        representatives: ``[B, H]`` int64, contiguous.
        clusters: k.
    """
    batch, heads = representatives.shape
    device = representatives.device
    order, slot, value_slot = torch.empty(3, batch, heads, dtype=torch.long, device=device)
    slot_heads = torch.empty(batch, clusters, dtype=torch.long, device=device)
    offsets = torch.empty(batch, clusters + 1, dtype=torch.long, device=device)
    wide = max(16, triton.next_power_of_2(heads))
    _columns[(batch,)](
        representatives, order, slot, value_slot, slot_heads, offsets, heads, clusters,
        HP=wide, num_warps=4,
    )  # fmt: skip
    return {
        "order": order, "slot": slot, "value_slot": value_slot, "slot_heads": slot_heads,
        "offsets": offsets,
    }  # fmt: skip


def chunk_tables(
    representatives: Tensor, count: int, members: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return slot, query, key, head and value tables of `Chunks`, in multi-head attention.

    Args:
        representatives: ``[B, H]`` int64.
        count: N, chunks that a row can have.
        members: M.
    """
    batch, heads = representatives.shape
    device = representatives.device
    line, lane = batch * count, batch * count * members
    memory = torch.full((3 * line + 2 * lane,), -1, dtype=torch.int32, device=device)
    slot, query, key, head, value = memory.split([line, line, line, lane, lane])
    wide = max(16, triton.next_power_of_2(heads))
    _deal[(batch,)](
        representatives.contiguous(), slot, query, key, head, value, heads, count,
        M=members, HP=wide, num_warps=4,
    )  # fmt: skip
    shape = (batch, count)
    return (
        slot.view(shape), query.view(shape), key.view(shape),
        head.view(*shape, members), value.view(*shape, members),
    )  # fmt: skip
