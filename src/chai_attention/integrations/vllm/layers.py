"""A profile as vLLM runs it: one plan per layer, for the heads that one rank holds.

With tensor parallelism every rank holds some of the heads (see `chai_attention.ranks`), and
probabilities never cross ranks. Every rank must have pages of the same size (see `shares`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from chai_attention.clustering.assign import K_BYTES, assign_by_cost
from chai_attention.errors import ProfileError
from chai_attention.integrations.vllm.pages import PageLayout, near_page
from chai_attention.integrations.vllm.shares import fixed_shares, online_shares
from chai_attention.membership import Membership
from chai_attention.profile import ClusterProfile
from chai_attention.ranks import rank_problem
from chai_attention.runtime.plan import LayerPlan, layer_plans
from chai_attention.runtime.shape import ModelShape

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ServedLayer:
    """One layer's heads on one rank.

    Attributes:
        plan: how they are clustered; heads count from the rank's first.
        kept: K heads that far pages hold, the same on every rank.
        fallback: ``[H]`` representatives of requests whose first chunk of tokens is too short to
            tell, of layers with an online membership.
        exact: streaming heads of the plan that attend to all keys nevertheless, as another rank has
            fewer of them (online memberships only).
    """

    plan: LayerPlan
    kept: int
    fallback: tuple[int, ...]
    exact: tuple[int, ...] = ()

    @cached_property
    def streaming(self) -> tuple[int, ...]:
        """Heads that see near keys only."""
        return tuple(head for head in self.plan.streaming if head not in self.exact)

    @cached_property
    def kept_values(self) -> int:
        """V heads that far pages hold, the same on every rank."""
        return replace(self.plan, streaming=self.streaming).kept_values

    def membership(self, device: torch.device | str | None = None) -> Membership:
        """The membership that does not depend on the request, of one row."""
        rep = self.plan.representatives or self.fallback
        # made on the CPU, so that kernels know the sizes of the clusters without waiting
        member = self.membership_of(torch.tensor([rep]))
        return member if device is None else member.to(device)

    def membership_of(self, representatives: torch.Tensor) -> Membership:
        """The membership of ``[B, H]`` representatives; a streaming head's is itself."""
        plan = self.plan
        return Membership.from_representatives(
            representatives,
            plan.clusters + len(self.exact),
            plan.kv_heads,
            self.kept,
            self.streaming,
        )

    @property
    def reads_copies(self) -> bool:
        """Whether prompts read pages of 8 bits as copies of 16; with a window they do not."""
        return not self.plan.is_identity and not self.plan.has_recent_window

    @property
    def kind(self) -> Hashable:
        """Layers of one kind run the same kernels."""
        plan = self.plan
        kept = self.kept, self.kept_values, len(self.streaming)
        return plan.clusters, kept, plan.needs_probe, plan.has_recent_window

    def layout(self, head_dim: int, value_dim: int) -> PageLayout:
        """Far pages of this layer: K and V for all tokens."""
        return PageLayout(self.kept, self.kept_values, head_dim, value_dim)

    def near_layout(self, head_dim: int, value_dim: int) -> PageLayout | None:
        """Near pages of this layer: what far pages lack, for the exact window; None without."""
        keys, values = self.plan.kv_heads - self.kept, self.plan.kv_heads - self.kept_values
        if not self.plan.has_recent_window or not keys + values:
            return None
        return PageLayout(keys, values, head_dim, value_dim)


def near_page_tokens(
    layers: Iterable[ServedLayer], page: int, head_dim: int, value_dim: int
) -> int:
    """Tokens of the near pages of a model, the same in all layers and on all ranks.

    Args:
        layers: all that the model has, of any tensor-parallel rank.
        page: tokens of a far page.
        head_dim: D.
        value_dim: Dv.
    """
    far = near = recent = 0
    for layer in layers:
        recent = max(recent, layer.plan.recent)
        far += layer.layout(head_dim, value_dim).numbers_per_token
        layout = layer.near_layout(head_dim, value_dim)
        near += 0 if layout is None else layout.numbers_per_token
    return near_page(page, far, near, recent)


def served_layers(
    shape: ModelShape, profile: ClusterProfile, ranks: int = 1, rank: int = 0
) -> tuple[ServedLayer, ...]:
    """Return the layers of ``rank`` of ``ranks``.

    Clusters that lie across ranks are taken apart, and ranks that need fewer heads' scores, or
    fewer V heads, than another keep spare ones, so a profile saves less with more ranks. An online
    membership finds k / ranks clusters, rounded up, among each rank's heads, or as its share of the
    heads that do not stream demands.

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
        _share(plan, table, ranks, rank) for plan, table in zip(plans, similarity, strict=True)
    )


def _share(plan: LayerPlan, similarity: Table | None, ranks: int, rank: int) -> ServedLayer:
    """One rank's share of a layer."""
    heads, groups = plan.heads // ranks, plan.kv_heads // ranks
    first = rank * heads
    local = replace(
        plan,
        heads=heads,
        kv_heads=groups,
        costs=_part(plan.costs, first, heads),
        offsets=_part(plan.offsets, first, heads),
    )
    every, whole = tuple(range(heads)), plan.target == K_BYTES
    # a layer that keeps all its heads on every rank needs no tables
    identity = replace(local, clusters=heads, representatives=None, streaming=())
    if plan.is_identity:
        return ServedLayer(identity, groups, every)
    if not plan.needs_probe:
        rep = plan.representatives or tuple(range(plan.heads))
        mine = fixed_shares(rep, plan.streaming, ranks, plan.kv_heads, whole)[rank]
        if mine.is_identity:
            return ServedLayer(identity, groups, every)
        fixed = replace(
            local,
            clusters=len(set(mine.representatives)) - len(mine.streaming),
            representatives=mine.representatives,
            streaming=mine.streaming,
        )
        return ServedLayer(fixed, mine.kept, mine.representatives)
    share = online_shares(plan.clusters, plan.heads, plan.streaming, ranks, plan.kv_heads, whole)[
        rank
    ]
    if share.is_identity:
        return ServedLayer(identity, groups, every)
    local = replace(local, clusters=share.clusters, streaming=share.streaming)
    fallback = _fallback(local, _part(similarity, first, heads))
    return ServedLayer(local, share.kept, fallback, share.exact)


def _part(table: Table | None, first: int, heads: int) -> Table | None:
    """Rows and columns of ``heads`` heads."""
    if table is None:
        return None
    return tuple(row[first : first + heads] for row in table[first : first + heads])


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
    found = list(range(plan.heads))
    far = [head for head in found if head not in plan.streaming]
    if far:
        kv_heads = len(far) * plan.kv_heads // plan.heads
        rep = assign_by_cost(cost[:, far][:, :, far], plan.clusters, kv_heads, plan.target)
        for number, chosen in zip(far, rep[0].tolist(), strict=True):
            found[number] = far[chosen]
    return tuple(found)
