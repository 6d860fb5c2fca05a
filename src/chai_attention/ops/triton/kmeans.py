"""k-means of heads in one launch: what `clustering.kmeans` computes, a program per sequence.

The search of `clustering.kmeans` is hundreds of small tensor operations one after the other, each
a launch on a GPU. Here a program keeps the Gram matrix of its sequence in registers and runs the
whole search: greedy seeds, moves of single heads, medoids. Costs that differ by rounding alone
count as equal in both, so both return the same memberships.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.triton.sizes import power_of_2
from chai_attention.ops.triton.tables import table_memory, write_tables

WARPS = {16: 2, 32: 4, 64: 8, 128: 16}  # by heads, padded
MAX_HEADS = 128  # a Gram matrix of more does not fit the registers of a program
BLOCK = 32  # features that a program multiplies at a time
# of the products of features: three TF32 products lose nothing that could change a choice
PRECISION = "tf32x3"
# integers that one compiled kernel serves whatever they are
SIZES = [
    "batch", "heads", "clusters", "kept", "first_members", "first_count", "second_members",
    "second_count",
]  # fmt: skip


@triton.jit
def gram_of(
    features_ptr, row, head, heads, size,
    HP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products of the features of all heads of a sequence, ``[HP, HP]``; no NaN."""
    gram = tl.zeros([HP, HP], dtype=tl.float32)
    start = features_ptr + (row * heads + head[:, None]) * size
    for first in range(0, size, BLOCK):
        n = first + tl.arange(0, BLOCK)[None, :]
        part = tl.load(start + n, mask=(head < heads)[:, None] & (n < size), other=0.0)
        gram = tl.dot(part, tl.trans(part), gram, input_precision=PRECISION)
    # whatever the model computed, the choices below have to be heads
    return tl.where(gram == gram, gram, 0.0)


@triton.jit
def lowest(cost, index, tie, END: tl.constexpr):
    """Lowest index of those within ``tie`` of the smallest cost, of one or two axes."""
    return tl.min(tl.where(cost <= tl.min(cost) + tie, index, END))


@triton.jit
def _seeds(distance, real, tie, head, clusters, HP: tl.constexpr):
    """Label of each head's nearest seed; each seed lowers the summed distance most."""
    best = tl.where(real, float("inf"), 0.0)  # [HP]; padding adds nothing to a sum
    label = tl.where(real, 0, -1)
    taken = head < 0
    for step in range(clusters):
        total = tl.sum(tl.minimum(best[None, :], distance), axis=1)
        total = tl.where(taken | (real == 0), float("inf"), total)
        seed = lowest(total, head, tie, HP)
        chosen = head == seed
        to_seed = tl.sum(tl.where(chosen[:, None], distance, 0.0), axis=0)
        # strictly nearer by the tie margin: equal heads stay with the earlier seed
        nearer = ((to_seed < best - tie) | chosen) & (taken == 0) & real
        label = tl.where(nearer, step, label)
        best = tl.where(nearer, to_seed, best)
        taken = taken | chosen
    return label


@triton.jit
def _refine(
    gram, norm, label, real, tie, head, heads, clusters, HP: tl.constexpr, KP: tl.constexpr
):
    """Move one head at a time to another cluster while that lowers the inertia."""
    cluster = tl.arange(0, KP)
    index = head[:, None] * KP + cluster[None, :]
    # inner products of every head with the sum of each cluster; a move changes two columns
    cross = tl.zeros([HP, KP], dtype=tl.float32)
    for c in range(clusters):
        column = tl.sum(tl.where(label[None, :] == c, gram, 0.0), axis=1)
        cross = tl.where(cluster[None, :] == c, column[:, None], cross)
    step = 0
    limit = 2 * heads
    while step < limit:
        member = label[:, None] == cluster[None, :]  # [HP, KP]
        size = tl.sum(member.to(tl.float32), axis=0)  # [KP]
        count = tl.maximum(size, 1.0)
        within = tl.sum(tl.where(member, cross, 0.0), axis=0)
        distance = norm[:, None] - 2 * cross / count[None, :] + (within / (count * count))[None, :]
        own_size = tl.sum(tl.where(member, size[None, :], 0.0), axis=1)  # [HP]
        own = tl.sum(tl.where(member, distance, 0.0), axis=1)
        leave = own * own_size / tl.maximum(own_size - 1, 1.0)
        change = distance * (size / (size + 1))[None, :] - leave[:, None]
        allowed = (label[:, None] != cluster[None, :]) & ((own_size > 1) & real)[:, None]
        change = tl.where(allowed & (cluster < clusters)[None, :], change, float("inf"))
        move = lowest(change, index, tie, HP * KP)
        gain = tl.min(tl.where(index == move, change, float("inf")))
        better = gain < -tie
        moved = tl.where(better, move // KP, HP)  # no head, if no move is better
        source = tl.max(tl.where(head == moved, label, -1))
        column = tl.sum(tl.where(head[None, :] == moved, gram, 0.0), axis=1)[:, None]
        cross += tl.where(cluster[None, :] == move % KP, column, 0.0)
        cross -= tl.where(cluster[None, :] == source, column, 0.0)
        label = tl.where(head == moved, move % KP, label)
        step = tl.where(better, step + 1, limit)
    return label


@triton.jit(do_not_specialize=SIZES)
def _kmeans(
    features_ptr, long_ptr, first_ptr, second_ptr, tie_share, batch, heads, size,
    clusters, kept, first_members, first_count, second_members, second_count,
    HP: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    TABLES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HP)
    real = head < heads
    gram = gram_of(features_ptr, row, head, heads, size, HP, BLOCK, PRECISION)
    norm = tl.sum(tl.where(head[:, None] == head[None, :], gram, 0.0), axis=1)
    tie = tie_share * tl.maximum(tl.max(norm), 1e-30)
    distance = tl.maximum(norm[:, None] + norm[None, :] - 2 * gram, 0.0)
    label = _seeds(distance, real, tie, head, clusters, HP)
    label = _refine(gram, norm, label, real, tie, head, heads, clusters, HP, KP)
    # medoids: the centre's norm is the same for all members, so it cannot change the choice
    same = label[:, None] == label[None, :]
    to_centre = tl.sum(tl.where(same, gram, 0.0), axis=1) / tl.sum(same.to(tl.float32), axis=1)
    cost = tl.where(same, (norm - 2 * to_centre)[None, :], float("inf"))
    local = cost <= tl.min(cost, axis=1)[:, None] + tie
    rep = tl.min(tl.where(local, head[None, :], HP), axis=1)
    if TABLES:
        write_tables(
            rep, long_ptr, first_ptr, second_ptr, row, batch, head, heads, clusters, kept,
            first_members, first_count, second_members, second_count, 1, HP,
        )  # fmt: skip
    else:
        tl.store(long_ptr + row * heads + head, rep.to(tl.int64), mask=real)


def kmeans(
    features: Tensor, clusters: int, *, tie: float, members: tuple[int, int] | None = (8, 2)
) -> Membership:
    """Cluster heads as `clustering.kmeans.kmeans` does, in one launch; nothing is read on the host.

    Args:
        features: ``[B, H, F]`` float32, whose inner products are computed here.
        clusters: k, between 1 and H.
        tie: costs this close, relative to the largest norm of a head, count as equal.
        members: the sizes of head tiles that tables are made for; None for no tables.

    Returns:
        The membership, in multi-head attention, with its tables.

    Raises:
        ValueError: k out of range, or more heads than a program can hold.
    """
    batch, heads, size = features.shape
    if not 1 <= clusters <= heads:
        raise ValueError(f"cannot make {clusters} clusters of {heads} heads")
    if heads > MAX_HEADS:
        raise ValueError(f"the kernel takes up to {MAX_HEADS} heads, not {heads}")
    memory = table_memory(batch, heads, clusters, heads, clusters, members, features.device)
    padded = max(16, power_of_2(heads))
    _kmeans[(batch,)](
        features.contiguous(), memory.tables, memory.first, memory.second, tie, batch, heads,
        size, *memory.sizes,
        HP=padded, KP=max(16, power_of_2(clusters)), BLOCK=BLOCK, PRECISION=PRECISION,
        TABLES=members is not None, num_warps=WARPS[padded],
    )  # fmt: skip
    return memory.membership
