"""What one layer does with its heads, decided when a profile meets a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from chai_attention.clustering.assign import K_BYTES, SCORES, assign, assign_by_cost
from chai_attention.clustering.kmeans import TIE, squared_distances
from chai_attention.clustering.kmedoids import choices
from chai_attention.errors import UnsupportedModelError
from chai_attention.index_tables import table_of
from chai_attention.membership import Membership
from chai_attention.ops import window_gram, window_output_distances
from chai_attention.ops.online import (
    fused_membership,
    fused_representatives,
)
from chai_attention.ops.probe import HeadClustering, Windows
from chai_attention.profile import BLEND, STATIC, ClusterProfile
from chai_attention.runtime.shape import ModelShape


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is clustered.

    Attributes:
        layer: index of the layer in the model.
        heads: H.
        kv_heads: G.
        clusters: k; H means that the layer is left as it is.
        streaming: heads that see local keys only, ascending.
        window: tokens of the probe window.
        target: "scores" or "k-bytes" (see `ClusterProfile`).
        representatives: ``[H]`` of a static membership, None for an online one.
        probe_start: real tokens before the probe window.
        features: what of the window is compared, "scores" or "value".
        blend: weight of ``costs`` against the window's distances.
        costs: ``[H, H]`` of a blended membership, else None.
        recent: w, the last keys that every head attends to with its own scores.
        sinks: s, the first keys that it does.
        offsets: ``[H, H]`` added to the log-sum-exp of head r (column) when head h (row) uses it
            for all other keys; None for zeros.
        full_attention: False for a sliding-window layer, which runs as it always does.
    """

    layer: int
    heads: int
    kv_heads: int
    clusters: int
    window: int
    target: str
    representatives: tuple[int, ...] | None = None
    probe_start: int = 0
    features: str = "scores"
    blend: float = 0.0
    costs: tuple[tuple[float, ...], ...] | None = None
    recent: int = 0
    sinks: int = 0
    offsets: tuple[tuple[float, ...], ...] | None = None
    full_attention: bool = True
    streaming: tuple[int, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether every head keeps its own scores."""
        return self.clusters == self.heads

    @property
    def shares(self) -> bool:
        """Whether some head uses another's scores."""
        return self.clusters + len(self.streaming) < self.heads

    @cached_property
    def kept_values(self) -> int:
        """V heads whose V is kept for all tokens."""
        group = self.heads // self.kv_heads
        sees = set(range(self.heads)) - set(self.streaming)
        return len({head // group for head in sees})

    @property
    def needs_probe(self) -> bool:
        """Whether the membership depends on the request."""
        return self.shares and self.representatives is None

    @property
    def has_recent_window(self) -> bool:
        """Whether heads use their own scores for the nearest keys, others' or none for the rest."""
        return self.recent > 0 and not self.is_identity

    def fixed_membership(self, batch: int, device: torch.device) -> Membership:
        """Return the membership of a layer that does not probe, for ``batch`` sequences."""
        if self.is_identity:
            return Membership.identity(self.heads, self.kv_heads, batch, device)
        rep = torch.tensor(self.representatives or range(self.heads))
        member = Membership.from_representatives(
            rep, kv_heads=self.kv_heads, streaming=self.streaming
        )
        return member.to(device).expand(batch)

    @property
    def probe_end(self) -> int:
        """Real tokens a sequence needs before its membership is decided."""
        return self.probe_start + self.window

    def online_membership(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Membership:
        """Cluster the heads of each sequence from its probe window.

        Args:
            query: ``[B, H, W, D]`` of the window.
            key: ``[B, G, W, D]`` of the window.
            value: ``[B, G, W, Dv]`` of the window, in the natural order of heads.
            scale: factor on the scores.
            softcap: as in `ops.reference.clustered_attention`.

        Raises:
            UnsupportedModelError: NaN or infinity in the window (found on the CPU).
        """
        if self.streaming:
            far = self._far.online_membership(*self._far_states(query, key, value), scale, softcap)
            return Membership.with_streaming(far, self.heads, self.kv_heads, self.streaming)
        how = self._clustering(query.device, scale, softcap)
        fused = fused_membership(query, key, value if self._by_value else None, how)
        if fused is not None:
            return fused
        kind = window_output_distances if self._by_value else window_gram
        states = (query, key, value) if self._by_value else (query, key)
        found = kind(*states, scale=scale, softcap=softcap)
        self._require_finite(found)
        if self.costs is None:
            rep = assign(found, self.clusters, self.kv_heads, self.target)
        else:
            distance = found if self._by_value else squared_distances(found)
            cost = relative(distance) + self._weighted_costs(query.device)
            rep = assign_by_cost(cost, self.clusters, self.kv_heads, self.target)
        # how many K/V heads "scores" needs depends on the data; otherwise it follows from k
        kept = None if self.target == SCORES else self.clusters * self.kv_heads // self.heads
        return Membership.from_representatives(rep, self.clusters, self.kv_heads, kept)

    @property
    def clustered(self) -> tuple[int, ...] | None:
        """Heads that an online membership is found for; None for all."""
        return self._far_heads if self.streaming else None

    def packed_representatives(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, count: Tensor,
        scale: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Cluster heads of sequences whose probe windows are among packed tokens.

        Args:
            query: ``[T, H, D]``.
            key: ``[T, G, D]``.
            value: ``[T, G, Dv]``.
            tokens: ``[B, W]`` int64, each window's tokens.
            count: ``[B]`` int32, how many of them are real; behind them stand any.
            scale: factor on the scores.
            softcap: as in `ops.reference.clustered_attention`.

        Returns:
            ``[B, n]`` int64, whom each of the `clustered` heads follows, by their numbers among
            themselves.

        Raises:
            UnsupportedModelError: NaN or infinity in the window (found on the CPU).
        """
        far = self._far if self.streaming else self
        heads = table_of(self._far_heads, query.device) if self.streaming else None
        found = fused_representatives(
            query, key,
            self._far_values(value[tokens].transpose(1, 2)) if far._by_value else None,
            Windows(tokens, count, heads), far._clustering(query.device, scale, softcap),
        )  # fmt: skip
        if found is not None:
            return found
        # without scores all heads' maps are alike, which moves no head from another
        real = torch.arange(tokens.shape[1], device=count.device) < count[:, None]
        q, k, v = (x[tokens].transpose(1, 2) for x in (query, key, value))
        q = q.masked_fill(~real[:, None, :, None], 0.0)
        if self.streaming:
            q, k, v = self._far_states(q, k, v)
        return far.online_membership(q, k, v, scale, softcap).representatives

    @cached_property
    def _far_heads(self) -> tuple[int, ...]:
        """Heads that do not stream; with grouped queries K/V heads stream whole."""
        return tuple(head for head in range(self.heads) if head not in self.streaming)

    @cached_property
    def _far(self) -> LayerPlan:
        """The plan of the heads that do not stream, as if there were no others."""
        heads = self._far_heads
        costs = self.costs and tuple(tuple(self.costs[h][r] for r in heads) for h in heads)
        return replace(
            self, heads=len(heads), kv_heads=len(heads) * self.kv_heads // self.heads,
            costs=costs, streaming=(),
        )  # fmt: skip

    def _far_states(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V of the heads that do not stream."""
        heads = table_of(self._far_heads, query.device)
        return query[:, heads], self._far_values(key), self._far_values(value)

    def _far_values(self, states: Tensor) -> Tensor:
        """K or V ``[B, G, W, D]`` of the heads that do not stream."""
        if not self.streaming:
            return states
        group = self.heads // self.kv_heads
        groups = tuple(dict.fromkeys(head // group for head in self._far_heads))
        return states[:, table_of(groups, states.device)]

    def _require_finite(self, found: Tensor) -> None:
        """Refuse NaN and infinity; not on a GPU, whose answer would have to be waited for."""
        if found.device.type == "cpu" and not bool(found.isfinite().all()):
            raise UnsupportedModelError(
                f"Q, K or V of layer {self.layer} are not finite in the probe window: the model's "
                "weights hold NaN or infinity, or numbers overflow in float16 (load it in bfloat16 "
                "or float32)"
            )

    @property
    def _by_value(self) -> bool:
        """Whether the window's heads are compared by what they put out."""
        return self.costs is not None and self.features == "value"

    def _clustering(
        self, device: torch.device, scale: float, softcap: float | None
    ) -> HeadClustering:
        """How kernels cluster: by k-means of attention maps, or by k-medoids on costs."""
        if self.costs is None and self.target == SCORES:
            return HeadClustering(self.clusters, scale, softcap, TIE, by_means=True)
        units = self.heads if self.target == SCORES else self.kv_heads
        return HeadClustering(
            self.clusters, scale, softcap, TIE,
            static=None if self.costs is None else self._weighted_costs(device),
            choices=choices(units, self.clusters * units // self.heads),
            whole_groups=self.target == K_BYTES,
        )  # fmt: skip

    def _weighted_costs(self, device: torch.device) -> Tensor:
        """``[H, H]`` static costs as they are added to those of the window."""
        if device not in self._weighted:
            table = _table(self.costs or (), device)
            self._weighted[device] = self.blend * relative(table[None])[0]
        return self._weighted[device]

    @cached_property
    def _weighted(self) -> dict[torch.device, Tensor]:
        return {}

    def offset_table(self, device: torch.device) -> Tensor | None:
        """``[H, H]`` float32 offsets on ``device``, None for zeros."""
        return None if self.offsets is None else _table(self.offsets, device)


@lru_cache(maxsize=1024)
def _table(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=device)


def relative(cost: Tensor) -> Tensor:
    """Divide ``[B, H, H]`` costs by their mean over pairs of different heads."""
    heads = cost.shape[-1]
    own = torch.eye(heads, dtype=torch.bool, device=cost.device)
    total = cost.masked_fill(own, 0.0).sum((1, 2), keepdim=True)
    return cost * (heads * (heads - 1) / total.clamp_min(1e-30))


def layer_plans(shape: ModelShape, profile: ClusterProfile) -> tuple[LayerPlan, ...]:
    """Return the plan of every layer of a model of ``shape``; the profile must fit it.

    Raises:
        ProfileError: the profile was made for another model, or is inconsistent.
    """
    profile.check(shape)
    static = profile.membership == STATIC
    blend = profile.membership == BLEND
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
            probe_start=profile.probe_start,
            features=profile.features,
            blend=profile.blend,
            costs=profile.costs[layer] if blend and profile.costs is not None else None,
            recent=profile.recent,
            sinks=profile.sinks,
            offsets=None if profile.offsets is None else profile.offsets[layer],
            full_attention=shape.clusterable[layer],
            streaming=profile.streaming_heads(layer),
        )
        for layer in range(shape.layers)
    )
