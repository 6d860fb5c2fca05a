"""A profile as vLLM runs it: one plan per layer, for the heads that one rank holds.

With tensor parallelism every rank holds some of the heads, and probabilities never cross ranks.
Every rank must have pages of the same size.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from chai_attention.clustering.assign import K_BYTES, assign_by_cost
from chai_attention.errors import ProfileError
from chai_attention.integrations.transformers.plan import LayerPlan, layer_plans
from chai_attention.integrations.transformers.support import ModelShape
from chai_attention.integrations.vllm.pages import PageLayout
from chai_attention.membership import Membership
from chai_attention.profile import ClusterProfile

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ServedLayer:
    """One layer's heads on one rank.

    Attributes:
        plan: how they are clustered; heads count from the rank's first.
        kept: K heads that pages hold, the same on every rank.
        fallback: ``[H]`` representatives of requests whose first chunk of tokens is too short to
            tell, of layers with an online membership.
    """

    plan: LayerPlan
    kept: int
    fallback: tuple[int, ...]

    def membership(self, device: torch.device | str | None = None) -> Membership:
        """The membership that does not depend on the request, of one row."""
        rep = self.plan.representatives or self.fallback
        # made on the CPU, so that kernels know the sizes of the clusters without waiting
        member = self.membership_of(torch.tensor([rep]))
        return member if device is None else member.to(device)

    def membership_of(self, representatives: torch.Tensor) -> Membership:
        """The membership of ``[B, H]`` representatives."""
        plan = self.plan
        return Membership.from_representatives(
            representatives, plan.clusters, plan.kv_heads, self.kept
        )

    @property
    def kind(self) -> Hashable:
        """Layers of one kind run the same kernels."""
        plan = self.plan
        return plan.clusters, self.kept, plan.needs_probe, plan.has_recent_window

    def layout(self, head_dim: int, value_dim: int) -> PageLayout:
        """Pages of this layer."""
        return PageLayout(self.kept, self.plan.kv_heads, head_dim, value_dim)


def served_layers(
    shape: ModelShape, profile: ClusterProfile, ranks: int = 1, rank: int = 0
) -> tuple[ServedLayer, ...]:
    """Return the layers of ``rank`` of ``ranks``.

    Clusters that lie across ranks are taken apart, and ranks that need fewer heads' scores than
    another keep spare ones, so a profile saves less with more ranks. An online membership finds
    k / ranks clusters, rounded up, among each rank's heads.

    Raises:
        ProfileError: the profile does not fit the model, or the heads do not fit the ranks.
    """
    plans = layer_plans(shape, profile)
    if shape.kv_heads % ranks:
        raise ProfileError(
            f"{shape.kv_heads} K/V heads cannot be dealt to {ranks} ranks: choose a "
            "--tensor-parallel-size that divides them"
        )
    similarity = profile.similarity or (None,) * shape.layers
    return tuple(
        _share(plan, table, ranks, rank) for plan, table in zip(plans, similarity, strict=True)
    )


def _share(plan: LayerPlan, similarity: Table | None, ranks: int, rank: int) -> ServedLayer:
    """One rank's share of a layer."""
    heads, groups = plan.heads // ranks, plan.kv_heads // ranks
    first = rank * heads
    unit = heads // groups if plan.target == K_BYTES else 1
    local = replace(
        plan,
        heads=heads,
        kv_heads=groups,
        costs=_part(plan.costs, first, heads),
        offsets=_part(plan.offsets, first, heads),
    )
    if plan.is_identity or plan.representatives is not None:
        rep = plan.representatives or tuple(range(plan.heads))
        shares = _even_shares(rep, ranks, heads, unit)
        kept = max(len({head * groups // heads for head in share}) for share in shares)
        mine = shares[rank]
        # a layer that keeps all its heads on every rank needs no tables
        fixed = None if plan.is_identity else mine
        local = replace(local, clusters=len(set(mine)), representatives=fixed)
        return ServedLayer(local, kept if heads != groups else local.clusters, mine)
    # a whole number of units of clusters on each rank
    clusters = -(-plan.clusters // (ranks * unit)) * unit
    local = replace(local, clusters=clusters)
    kept = clusters // (heads // groups) if plan.target == K_BYTES else min(clusters, groups)
    return ServedLayer(local, kept, _fallback(local, _part(similarity, first, heads)))


def _part(table: Table | None, first: int, heads: int) -> Table | None:
    """Rows and columns of ``heads`` heads."""
    if table is None:
        return None
    return tuple(row[first : first + heads] for row in table[first : first + heads])


def _even_shares(
    representatives: tuple[int, ...], ranks: int, heads: int, unit: int
) -> list[tuple[int, ...]]:
    """Representatives on each rank, counted from its first head, equally many on all.

    Heads whose representative is on another rank get a member of their cluster on their own, the
    lowest. ``unit`` neighbouring heads become representatives together.
    """
    shares = []
    for rank in range(ranks):
        mine = range(rank * heads, (rank + 1) * heads)
        chosen: dict[int, int] = {}  # cluster to its representative here
        for head in mine:
            cluster = representatives[head]
            chosen.setdefault(cluster, cluster if cluster in mine else head)
        share = [chosen[representatives[head]] - mine.start for head in mine]
        for start in {rep // unit * unit for rep in share}:
            share[start : start + unit] = range(start, start + unit)
        shares.append(share)
    most = max(len(set(share)) for share in shares)
    for share in shares:
        while len(set(share)) < most:
            spare = next(head for head in range(0, heads, unit) if share[head] != head)
            share[spare : spare + unit] = range(spare, spare + unit)
    return [tuple(share) for share in shares]


def _fallback(plan: LayerPlan, similarity: Table | None) -> tuple[int, ...]:
    """What is known about the heads without a request: costs, else similarity, else nothing."""
    if plan.costs is not None:
        cost = torch.tensor([plan.costs])
    elif similarity is not None:
        cost = 1 - torch.tensor([similarity])
    else:
        # neighbouring heads together
        head = torch.arange(plan.heads, dtype=torch.float32)
        cost = (head[:, None] - head).abs()[None]
    rep = assign_by_cost(cost, plan.clusters, plan.kv_heads, plan.target)
    return tuple(int(head) for head in rep[0])
