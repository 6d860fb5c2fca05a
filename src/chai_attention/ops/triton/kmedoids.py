"""k-medoids of heads in one launch: what `clustering.assign` computes from costs.

A program per sequence: distances of maps from their Gram matrix, or distances that are known;
static costs blended in; the search of `clustering.kmedoids`; the tables of the membership. *Units*
are what is chosen: heads, or whole K/V heads in grouped-query attention.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.triton.kmeans import BLOCK, MAX_HEADS, PRECISION, SIZES, gram_of, lowest
from chai_attention.ops.triton.sizes import power_of_2
from chai_attention.ops.triton.tables import table_memory, write_tables

WARPS = {16: 2, 32: 4, 64: 8, 128: 16}  # by heads, padded
TILE = 4096  # numbers of a tile of choices and heads


@triton.jit
def _costs(
    distance_ptr, static_ptr, row, head, heads, size, tie_share,
    HP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, FROM_MAPS: tl.constexpr,
    HAS_STATIC: tl.constexpr,
):  # fmt: skip
    """Cost of every head (row) for using another's maps (column), and the margin of ties."""
    own = head[:, None] == head[None, :]
    real = (head < heads)[:, None] & (head < heads)[None, :]
    at = head[:, None] * heads + head[None, :]
    if FROM_MAPS:
        gram = gram_of(distance_ptr, row, head, heads, size, HP, BLOCK, PRECISION)
        norm = tl.sum(tl.where(own, gram, 0.0), axis=1)
        cost = tl.maximum(norm[:, None] + norm[None, :] - 2 * gram, 0.0)
        cost = tl.where(real, cost, 0.0)
        largest = tl.max(norm)
    else:
        cost = tl.load(distance_ptr + row * heads * heads + at, mask=real, other=0.0)
        # neither NaN nor infinity, whatever the model computed: the choices have to be heads
        cost = tl.where(tl.abs(cost) <= 1e30, cost, 0.0)
        largest = tl.max(tl.abs(cost))
    if HAS_STATIC:
        total = tl.sum(tl.where(own, 0.0, cost))
        cost = cost * ((heads * (heads - 1)).to(tl.float32) / tl.maximum(total, 1e-30))
        cost += tl.load(static_ptr + at, mask=real, other=0.0)
        largest = tl.max(tl.abs(cost))
    # a head that keeps its scores pays nothing
    return tl.where(own, 0.0, cost), tie_share * tl.maximum(largest, 1e-30)


@triton.jit
def _try_all(
    scratch_ptr, choices_ptr, unit, heads, units, count, tie,
    NP: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """The best of all choices of units: ``[UP]`` bool."""
    n = tl.arange(0, NP)
    total = tl.where(n < count, 0.0, float("inf"))
    for first in range(0, heads, HB):
        h = first + tl.arange(0, HB)
        best = tl.full([HB, NP], float("inf"), dtype=tl.float32)
        for u in range(units):
            cost = tl.load(scratch_ptr + h * units + u, mask=h < heads, other=0.0)
            allowed = tl.load(choices_ptr + u * NP + n) != 0
            best = tl.where(allowed[None, :], tl.minimum(best, cost[:, None]), best)
        total += tl.sum(tl.where((h < heads)[:, None], best, 0.0), axis=0)
    pick = lowest(total, n, tie, NP)
    return tl.load(choices_ptr + unit * NP + pick, mask=unit < units, other=0) != 0


@triton.jit
def _greedy(nearest, unit, real, units, kept, tie, UP: tl.constexpr):
    """Add the unit that lowers the summed cost most, one after the other: ``[UP]`` bool."""
    best = tl.where(real, float("inf"), 0.0)  # [HP]; padding adds nothing to a sum
    chosen = unit < 0
    for _step in range(kept):
        total = tl.sum(tl.minimum(best[:, None], nearest), axis=0)
        total = tl.where(chosen | (unit >= units), float("inf"), total)
        pick = unit == lowest(total, unit, tie, UP)
        chosen = chosen | pick
        best = tl.minimum(best, tl.sum(tl.where(pick[None, :], nearest, 0.0), axis=1))
    return chosen


@triton.jit
def _swap(nearest, chosen, unit, units, tie, UP: tl.constexpr):
    """Swap a chosen for another unit while it lowers the summed cost: ``[UP]`` bool."""
    index = unit[:, None] * UP + unit[None, :]  # of the unit that leaves, the unit that enters
    step = 0
    while step < units:
        of_chosen = tl.where(chosen[None, :], nearest, float("inf"))  # [HP, UP]
        best = tl.min(of_chosen, axis=1)
        user = tl.min(tl.where(of_chosen == best[:, None], unit[None, :], UP), axis=1)
        uses = user[:, None] == unit[None, :]
        second = tl.min(tl.where(uses, float("inf"), of_chosen), axis=1)
        # all heads use the best that stays; those of the unit that leaves fall back on the second
        stays = tl.minimum(best[:, None], nearest)
        falls = tl.minimum(second[:, None], nearest) - stays
        # zeros and ones are exact in TF32, the rest is in its upper and its lower digits
        upper = (falls.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        users = tl.trans(uses.to(tl.float32))
        total = tl.dot(users, upper, input_precision="tf32")
        total = tl.dot(users, falls - upper, total, input_precision="tf32")
        total += tl.sum(stays, axis=0)[None, :]
        enters = (chosen == 0) & (unit < units)
        total = tl.where(chosen[:, None] & enters[None, :], total, float("inf"))
        swap = lowest(total, index, tie, UP * UP)
        cost = tl.min(tl.where(index == swap, total, float("inf")))
        better = cost < tl.sum(best) - tie
        out, into = tl.where(better, swap // UP, UP), tl.where(better, swap % UP, UP)
        chosen = ((chosen != 0) & (unit != out)) | (unit == into)
        step = tl.where(better, step + 1, units)
    return chosen


@triton.jit(do_not_specialize=[*SIZES, "units", "count", "kept_units"])
def _kmedoids(
    distance_ptr, static_ptr, choices_ptr, scratch_ptr, long_ptr, first_ptr, second_ptr,
    tie_share, units, kept_units, count, batch, heads, size,
    clusters, kept, first_members, first_count, second_members, second_count,
    UNIT: tl.constexpr, GROUP: tl.constexpr, HP: tl.constexpr, UP: tl.constexpr,
    NP: tl.constexpr, HB: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    FROM_MAPS: tl.constexpr, HAS_STATIC: tl.constexpr, TABLES: tl.constexpr,
):  # fmt: skip
    """``NP`` is the number of choices, padded, 0 where there are too many to try them all."""
    row = tl.program_id(0).to(tl.int64)
    head, unit = tl.arange(0, HP), tl.arange(0, UP)
    real = head < heads
    cost, tie = _costs(
        distance_ptr, static_ptr, row, head, heads, size, tie_share,
        HP, BLOCK, PRECISION, FROM_MAPS, HAS_STATIC,
    )  # fmt: skip
    # cost of the cheapest head of each unit, from memory: a unit is a run of columns
    scratch_ptr += row * heads * (heads + units)
    inside = real[:, None] & real[None, :]
    tl.store(scratch_ptr + head[:, None] * heads + head[None, :], cost, mask=inside)
    tl.debug_barrier()
    known = real[:, None] & (unit < units)[None, :]
    nearest = tl.where(real, float("inf"), 0.0)[:, None] + tl.zeros([HP, UP], dtype=tl.float32)
    for member in tl.static_range(UNIT):
        at = scratch_ptr + head[:, None] * heads + unit[None, :] * UNIT + member
        nearest = tl.minimum(nearest, tl.load(at, mask=known, other=float("inf")))
    if NP > 0:
        nearest_ptr = scratch_ptr + heads * heads
        tl.store(nearest_ptr + head[:, None] * units + unit[None, :], nearest, mask=known)
        tl.debug_barrier()
        chosen = _try_all(nearest_ptr, choices_ptr, unit, heads, units, count, tie, NP, HB)
    else:
        chosen = _greedy(nearest, unit, real, units, kept_units, tie, UP)
        if kept_units > 1:  # a single one was the best already
            chosen = _swap(nearest, chosen, unit, units, tie, UP)
    mine = (head // UNIT)[:, None] == unit[None, :]
    allowed = tl.sum((mine & chosen[None, :]).to(tl.int32), axis=1) > 0
    cost = tl.where(allowed[None, :], cost, float("inf"))
    local = cost <= tl.min(cost, axis=1)[:, None] + tie
    rep = tl.min(tl.where(local, head[None, :], HP), axis=1)
    rep = tl.where(allowed, head, rep)
    if TABLES:
        write_tables(
            rep, long_ptr, first_ptr, second_ptr, row, batch, head, heads, clusters, kept,
            first_members, first_count, second_members, second_count, GROUP, HP,
        )  # fmt: skip
    else:
        tl.store(long_ptr + row * heads + head, rep.to(tl.int64), mask=real)


def kmedoids(
    distance: Tensor,
    clusters: int,
    *,
    from_maps: bool = False,
    static: Tensor | None = None,
    choices: Tensor | None = None,
    unit: int = 1,
    group: int = 1,
    tie: float,
    members: tuple[int, int] | None = (8, 2),
) -> Membership:
    """Cluster heads as `clustering.assign` does by k-medoids; nothing is read on the host.

    Args:
        distance: ``[B, H, H]`` float32, cost of head h (row) using the maps of head r; or, with
            ``from_maps``, maps ``[B, H, F]``, whose squared distances are the costs.
        clusters: k.
        from_maps: what ``distance`` is.
        static: ``[H, H]`` float32, added to the distances, which are then divided by their mean
            over pairs of different heads.
        choices: ``[N, H / unit]`` bool, all choices of units, to try all of them; None searches.
        unit: heads that are chosen together; divides k.
        group: query heads of a K/V head, for the tables; must be 1 or ``unit``.
        tie: costs this close, relative to the largest, count as equal.
        members: the sizes of head tiles that tables are made for; None for no tables.

    Returns:
        The membership with its tables.

    Raises:
        ValueError: k that does not fit, or more heads than a program can hold.
    """
    batch, heads, size = distance.shape
    if heads % unit or clusters % unit or not unit <= clusters <= heads:
        raise ValueError(f"cannot make {clusters} clusters of {heads} heads, {unit} at a time")
    if heads > MAX_HEADS:
        raise ValueError(f"the kernel takes up to {MAX_HEADS} heads, not {heads}")
    if group not in (1, unit):
        raise ValueError(f"the K heads that {clusters} representatives read are not known")
    device, units = distance.device, heads // unit
    memory = table_memory(
        batch, heads, clusters, heads // group, clusters // group, members, device
    )
    scratch = torch.empty(batch, heads, heads + units, dtype=torch.float32, device=device)
    padded = max(16, power_of_2(heads))
    if clusters == unit:  # the search's first step has tried them all
        choices = None
    wide, table = (0, None) if choices is None else _columns(choices, device)
    _kmedoids[(batch,)](
        distance.contiguous(), None if static is None else static.contiguous(), table, scratch,
        memory.tables, memory.first, memory.second, tie, units, clusters // unit,
        0 if choices is None else choices.shape[0], batch, heads, size, *memory.sizes,
        UNIT=unit, GROUP=group, HP=padded, UP=max(16, power_of_2(units)),
        NP=wide, HB=min(padded, TILE // max(1, wide)), BLOCK=BLOCK, PRECISION=PRECISION,
        FROM_MAPS=from_maps, HAS_STATIC=static is not None, TABLES=members is not None,
        num_warps=WARPS[padded],
    )  # fmt: skip
    return memory.membership


@lru_cache(maxsize=64)
def _columns(choices: Tensor, device: torch.device) -> tuple[int, Tensor]:
    """The number of choices, padded, and for every unit which of them it is in: int8."""
    count, units = choices.shape
    wide = max(16, power_of_2(count))
    table = torch.zeros(units, wide, dtype=torch.int8)
    table[:, :count] = choices.T
    return wide, table.to(device)
