"""Random clusters at the same K,V bytes: a control that shows what the choice of heads is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.clustering.assign import K_BYTES
from chai_attention.evaluation.profiled import Profiled, profile_digest
from chai_attention.profile import STATIC, ClusterProfile
from chai_attention.runtime.shape import ModelShape, describe


class RandomHeads(Profiled):
    """As many clusters and streaming heads per layer as a profile has, of random heads.

    What the profile has beside its memberships stays: how many heads go in which layer, the recent
    window, the offsets of far scores. So this row says what the choice of heads adds to those, and
    may well be ahead of recipes without them. A refit goes, as it was fitted to those
    memberships. With target "k-bytes" the K/V heads that keep their K are random, as many as in
    the profile. With target "scores" in a
    grouped-query model the K heads that are kept follow from the clusters, so that bytes may
    differ from the profile's.

    Args:
        profile: whose numbers are taken.
        seed: of the choice.
    """

    name = "random"
    source = "control for Agarwal et al., ICML 2024 (CHAI), section 3: a random choice of heads"

    def __init__(self, profile: ClusterProfile, seed: int = 0):
        super().__init__(profile)
        self._seed = seed

    def settings(self) -> Mapping[str, Any]:
        """The profile that gave the numbers, and the seed."""
        return {"profile": profile_digest(self.profile), "seed": self._seed}

    def profile_for(self, model: PreTrainedModel) -> ClusterProfile:
        """Return the random profile; the same one at every call."""
        shape = describe(model)
        self.profile.check(shape)
        return random_profile(self.profile, shape, self._seed)


def random_profile(profile: ClusterProfile, shape: ModelShape, seed: int) -> ClusterProfile:
    """Replace a profile's memberships by random static ones of the same sizes."""
    generator = torch.Generator().manual_seed(seed)
    unit = shape.group_size if profile.target == K_BYTES else 1
    layers, streaming = [], []
    for layer, k in enumerate(profile.clusters):
        streams = _shuffled(profile.streaming_heads(layer), shape, generator)  # [H] bool
        free = ~streams.view(-1, unit).any(1)  # units that can represent others
        units = free.nonzero().flatten()
        chosen = units[torch.randperm(len(units), generator=generator)[: k // unit]].sort().values
        representatives = (chosen[:, None] * unit + torch.arange(unit)).flatten()  # [k]
        rep = torch.arange(shape.heads)
        if k:
            rep = representatives[torch.randint(k, (shape.heads,), generator=generator)]
            rep[representatives] = representatives
        rep[streams] = streams.nonzero().flatten()
        layers.append(tuple(rep.tolist()))
        streaming.append(tuple(streams.nonzero().flatten().tolist()))
    return replace(
        profile,
        membership=STATIC,
        representatives=tuple(layers),
        streaming=None if profile.streaming is None else tuple(streaming),
        features="scores",
        blend=0.0,
        costs=None,
        refit=None,
        corrections=None,
        promise=None,
        provenance={"method": "random", "seed": seed},
    )


def _shuffled(streaming: Sequence[int], shape: ModelShape, generator: torch.Generator) -> Tensor:
    """Streaming heads at random, ``[H]`` bool: as many of them in each K/V head, so V goes too."""
    streams = torch.zeros(shape.heads, dtype=torch.bool)
    if not streaming:
        return streams
    streams[list(streaming)] = True
    by_group = streams.view(shape.kv_heads, -1)
    by_group = by_group[torch.randperm(shape.kv_heads, generator=generator)]
    order = torch.rand(by_group.shape, generator=generator).argsort(1)
    return by_group.gather(1, order).flatten()
