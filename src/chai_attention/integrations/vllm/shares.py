"""How the heads of a profile's layers are divided among ranks, and what each rank saves.

With tensor parallelism every rank holds some of the heads (see `chai_attention.ranks`).
Probabilities never cross ranks, and pages have one size on all of them. A rank that could hold less
than another keeps more instead: a head that shared another's scores, or saw local keys only, then
attends to all keys by itself. So with more ranks a profile saves less, and no head becomes less
exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from chai_attention.clustering.assign import K_BYTES, assign_by_cost
from chai_attention.errors import ProfileError
from chai_attention.integrations.vllm.layers import LayerShard
from chai_attention.profile import ClusterProfile
from chai_attention.ranks import copies, rank_problem
from chai_attention.runtime.plan import LayerPlan, layer_plans
from chai_attention.runtime.shape import ModelShape

Table = tuple[tuple[float, ...], ...]
NOTICED = 0.0005  # share of a saving that is worth a word


@dataclass(frozen=True)
class Share:
    """One rank's heads of a layer; heads count from the rank's first.

    Attributes:
        clusters: among the heads that see far keys.
        streaming: heads that see local keys only, ascending.
        kept: K heads that pages hold, the same on all ranks.
        representatives: whose scores each head uses for far keys, itself if it streams; None where
            every request decides that.
        exact: those of ``streaming`` that attend to all keys nevertheless, as another rank has
            fewer of them; only where requests decide.
    """

    clusters: int
    streaming: tuple[int, ...]
    kept: int
    representatives: tuple[int, ...] | None = None
    exact: tuple[int, ...] = ()


class _Heads:
    """Heads of one rank while they are dealt."""

    def __init__(self, representatives: Sequence[int], streaming: set[int], group: int):
        self.group = group
        self.representatives = list(representatives)
        self.streaming = streaming

    @property
    def is_identity(self) -> bool:
        """Whether every head attends to all keys by itself."""
        return not self.streaming and self.representatives == list(range(len(self.representatives)))

    def far(self) -> list[int]:
        """Heads that see far keys."""
        return [head for head in range(len(self.representatives)) if head not in self.streaming]

    def needed_values(self) -> set[int]:
        """K/V heads whose V is needed for far keys."""
        return {head // self.group for head in self.far()}

    def needed_keys(self) -> set[int]:
        """K/V heads whose K is needed for far keys."""
        return {self.representatives[head] // self.group for head in self.far()}

    def keep(self, kv_head: int) -> None:
        """Let all query heads of a K/V head attend by themselves."""
        heads = range(kv_head * self.group, (kv_head + 1) * self.group)
        self.representatives[heads.start : heads.stop] = heads
        self.streaming -= set(heads)


def _fixed_shares(plan: LayerPlan, ranks: int) -> list[Share] | None:
    """Deal a layer with a fixed membership; None if all heads attend to all keys by themselves.

    Heads whose representative is on another rank get a member of their cluster on their own, the
    lowest.
    """
    heads, groups = plan.heads // ranks, plan.kv_heads // ranks
    dealt = [_rank(plan, range(rank * heads, (rank + 1) * heads)) for rank in range(ranks)]
    if plan.target == K_BYTES:  # all query heads of a K/V head become representatives together
        for one in dealt:
            for kv_head in one.needed_keys():
                one.keep(kv_head)
    values = max(len(one.needed_values()) for one in dealt)
    for one in dealt:
        _keep_until(one, values, range(groups))
    keys = max(len(one.needed_keys()) for one in dealt)
    for one in dealt:
        _keep_until(one, keys, sorted(one.needed_values()), of_keys=True)
    if any(one.is_identity for one in dealt):  # nothing is removed on the others either
        return None
    return [
        Share(
            len(set(one.representatives)) - len(one.streaming), tuple(sorted(one.streaming)), keys,
            tuple(one.representatives),
        )
        for one in dealt
    ]  # fmt: skip


def _rank(plan: LayerPlan, mine: range) -> _Heads:
    """Heads ``mine``, whose representatives are all on this rank."""
    rep = plan.representatives or tuple(range(plan.heads))
    chosen: dict[int, int] = {}  # cluster to its representative here
    for head in mine:
        chosen.setdefault(rep[head], rep[head] if rep[head] in mine else head)
    streaming = {head - mine.start for head in plan.streaming if head in mine}
    local = [chosen[rep[head]] - mine.start for head in mine]
    return _Heads(local, streaming, plan.heads // plan.kv_heads)


def _keep_until(one: _Heads, count: int, kv_heads: Sequence[int], of_keys: bool = False) -> None:
    """Keep more K/V heads whole, the lowest first, until so many V or K heads are needed."""
    for kv_head in kv_heads:
        needed = one.needed_keys() if of_keys else one.needed_values()
        if len(needed) >= count:
            return
        if kv_head not in needed:
            one.keep(kv_head)


def _online_shares(plan: LayerPlan, ranks: int) -> list[Share] | None:
    """Deal a layer of which each rank clusters its own heads; None as of `_fixed_shares`.

    A rank finds clusters for its share of the heads that see far keys, rounded up.
    """
    own, group = plan.heads // ranks, plan.heads // plan.kv_heads
    whole_groups = plan.target == K_BYTES  # then clusters are whole K/V heads
    unit = group if whole_groups else 1
    local = [
        tuple(head - rank * own for head in sorted(plan.streaming) if head // own == rank)
        for rank in range(ranks)
    ]
    far = [own - len(local) for local in local]
    exact = [local[: max(far) - len_far] for local, len_far in zip(local, far, strict=True)]
    found = [-(-plan.clusters * each // (sum(far) * unit)) * unit if each else 0 for each in far]

    def keys(rank: int) -> int:
        of_clusters = min(found[rank] // unit, far[rank] // group)
        return of_clusters + len(exact[rank]) // group

    kept = max(map(keys, range(ranks)))
    if whole_groups or group == 1:  # K heads and clusters are the same: use what there is room for
        found = [(kept - len(spare) // group) * unit for spare in exact]
    if any(found[r] == far[r] and exact[r] == local[r] for r in range(ranks)):
        return None
    return [Share(found[r], local[r], kept, exact=exact[r]) for r in range(ranks)]


def layer_shards(
    shape: ModelShape, profile: ClusterProfile, ranks: int = 1, rank: int = 0
) -> tuple[LayerShard, ...]:
    """Return the layers of ``rank`` of ``ranks``.

    Clusters that lie across ranks are taken apart. A rank that needs fewer K or V heads than
    another keeps spare ones. An online membership finds k / ranks clusters, rounded up, among each
    rank's heads; with streaming heads, clusters in proportion to the rank's other heads.

    Raises:
        ProfileError: the profile does not fit the model, or the heads do not fit the ranks.
    """
    plans = layer_plans(shape, profile)
    problem = rank_problem(shape.heads, shape.kv_heads, ranks)
    if problem is not None:
        raise ProfileError(f"--tensor-parallel-size {ranks}: {problem}")
    # K/V heads that several ranks hold are heads of their own
    plans = tuple(replace(plan, kv_heads=max(shape.kv_heads, ranks)) for plan in plans)
    similarity = profile.similarity or (None,) * shape.layers
    return tuple(
        _shard(plan, table, ranks, rank) for plan, table in zip(plans, similarity, strict=True)
    )


def _shard(plan: LayerPlan, similarity: Table | None, ranks: int, rank: int) -> LayerShard:
    """One rank's share of a layer."""
    heads, groups = plan.heads // ranks, plan.kv_heads // ranks
    first = rank * heads
    shares = None
    if not plan.is_identity:
        shares = _online_shares(plan, ranks) if plan.needs_probe else _fixed_shares(plan, ranks)
    local = replace(
        plan,
        heads=heads,
        kv_heads=groups,
        costs=_part(plan.costs, first, heads),
        offsets=_part(plan.offsets, first, heads),
    )
    if shares is None:  # a layer that keeps all its heads on every rank needs no tables
        identity = replace(local, clusters=heads, representatives=None, streaming=())
        return LayerShard(identity, groups, tuple(range(heads)))
    mine = shares[rank]
    local = replace(
        local,
        clusters=mine.clusters,
        representatives=mine.representatives,
        streaming=mine.streaming,
    )
    fallback = mine.representatives or _fallback(local, _part(similarity, first, heads))
    return LayerShard(local, mine.kept, fallback, mine.exact)


def _part(table: Table | None, first: int, heads: int) -> Table | None:
    """Rows and columns of ``heads`` heads."""
    if table is None:
        return None
    return tuple(row[first : first + heads] for row in table[first : first + heads])


def _fallback(plan: LayerPlan, similarity: Table | None) -> tuple[int, ...]:
    """The membership of requests that decide none: by costs, else similarity, else neighbours."""
    if plan.costs is not None:
        cost = torch.tensor([plan.costs])
    elif similarity is not None:
        cost = 1 - torch.tensor([similarity])
    else:
        # neighbouring heads together
        head = torch.arange(plan.heads, dtype=torch.float32)
        cost = (head[:, None] - head).abs()[None]
    found = list(range(plan.heads))
    far = [head for head in found if head not in plan.streaming]
    if far:
        kv_heads = len(far) * plan.kv_heads // plan.heads
        rep = assign_by_cost(cost[:, far][:, :, far], plan.clusters, kv_heads, plan.target)
        for number, chosen in zip(far, rep[0].tolist(), strict=True):
            found[number] = far[chosen]
    return tuple(found)


@dataclass(frozen=True)
class Savings:
    """K,V heads per token, summed over layers.

    Attributes:
        ranks: of tensor parallelism.
        made_for: ranks that the profile was made for.
        full: heads that a rank would hold without clusters, K and V.
        kept: those that its far pages hold.
        one_rank: those that one rank with all heads would hold.
        copies: ranks that hold the same K/V head.
    """

    ranks: int
    made_for: int
    full: int
    kept: int
    one_rank: int
    copies: int

    @property
    def share(self) -> float:
        """Share of a rank's K,V bytes per token that is saved."""
        return 1 - self.kept / max(1, self.full)

    @property
    def share_on_one(self) -> float:
        """The same of one rank that holds all heads."""
        return 1 - self.one_rank * self.copies / max(1, self.full * self.ranks)

    @property
    def lost(self) -> float:
        """Share of the saving on one GPU that is lost on ranks."""
        saved = self.share_on_one
        return 1 - self.share / saved if saved > 0 else 0.0

    @property
    def line(self) -> str:
        """What is saved, and why it is less than on one GPU."""
        if self.ranks == 1:
            return f"{self.share:.1%} of the K,V bytes per token saved"
        line = f"{self.share:.1%} of the K,V bytes per token saved on each of {self.ranks} ranks"
        if self.lost > NOTICED:
            return (
                f"{line}, {self.share_on_one:.1%} on one GPU: pages of one size keep "
                f"{self.lost:.1%} of the saving; chai calibrate --tensor-parallel {self.ranks} "
                "chooses heads so that they keep nothing"
            )
        made = f" (the profile is made for {self.made_for})" if self.made_for > 1 else ""
        return f"{line}, as on one GPU{made}"


def savings(
    shape: ModelShape,
    profile: ClusterProfile,
    ranks: int,
    layers: tuple[LayerShard, ...] | None = None,
) -> Savings:
    """Return what each of ``ranks`` saves.

    Args:
        shape: of the model.
        profile: for it.
        ranks: of tensor parallelism.
        layers: of one of them, where they are known.

    Raises:
        ProfileError: the profile does not fit the model, or the heads do not fit the ranks.
    """
    here = layer_shards(shape, profile, ranks) if layers is None else layers
    return Savings(
        ranks,
        profile.tensor_parallel,
        sum(2 * layer.plan.kv_heads for layer in here),
        _held(here),
        _held(layer_shards(shape, profile)),
        copies(shape.kv_heads, ranks),
    )


def _held(layers: tuple[LayerShard, ...]) -> int:
    return sum(layer.kept + layer.kept_values for layer in layers)
