"""What one layer does with its heads, decided when a profile meets a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chai_attention.clustering.assign import assign
from chai_attention.integrations.transformers.support import ModelShape
from chai_attention.membership import Membership
from chai_attention.ops import window_gram
from chai_attention.profile import ClusterProfile


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is clustered.

    Attributes:
        layer: index of the layer in the model.
        heads: H.
        kv_heads: G.
        clusters: k; H means that the layer is left as it is.
        window: tokens of the probe window.
        target: "scores" or "k-bytes" (see `ClusterProfile`).
        representatives: ``[H]`` of a static membership, None for an online one.
        full_attention: False for a sliding-window layer, which runs as it always does.
    """

    layer: int
    heads: int
    kv_heads: int
    clusters: int
    window: int
    target: str
    representatives: tuple[int, ...] | None = None
    full_attention: bool = True

    @property
    def is_identity(self) -> bool:
        """Whether every head keeps its own scores."""
        return self.clusters == self.heads

    @property
    def needs_probe(self) -> bool:
        """Whether the membership depends on the request."""
        return not self.is_identity and self.representatives is None

    def fixed_membership(self, batch: int, device: torch.device) -> Membership:
        """Return the membership of a layer that does not probe, for ``batch`` sequences."""
        if self.representatives is None:
            return Membership.identity(self.heads, self.kv_heads, batch, device)
        rep = torch.tensor(self.representatives, device=device)
        return Membership.from_representatives(rep, kv_heads=self.kv_heads).expand(batch)

    def online_membership(
        self, query: Tensor, key: Tensor, scale: float, softcap: float | None
    ) -> Membership:
        """Cluster the heads of each sequence from its probe window.

        Args:
            query: ``[B, H, W, D]`` of the window.
            key: ``[B, G, W, D]`` of the window.
            scale: factor on the scores.
            softcap: as in `ops.reference.attention`.
        """
        gram = window_gram(query, key, scale=scale, softcap=softcap)
        rep = assign(gram, self.clusters, self.kv_heads, self.target)
        # how many K/V heads "scores" needs depends on the data; otherwise it follows from k
        kept = None if self.target == "scores" else self.clusters * self.kv_heads // self.heads
        return Membership.from_representatives(rep, self.clusters, self.kv_heads, kept)


def layer_plans(shape: ModelShape, profile: ClusterProfile) -> tuple[LayerPlan, ...]:
    """Return the plan of every layer of a model of ``shape``; the profile must fit it.

    Raises:
        ProfileError: the profile was made for another model, or is inconsistent.
    """
    profile.check(shape)
    static = profile.membership == "static"
    return tuple(
        LayerPlan(
            layer=layer,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            clusters=profile.clusters[layer],
            window=profile.window,
            target=profile.target,
            representatives=(
                tuple(profile.representatives[layer])
                if static and profile.representatives is not None
                else None
            ),
            full_attention=shape.clusterable[layer],
        )
        for layer in range(shape.layers)
    )
