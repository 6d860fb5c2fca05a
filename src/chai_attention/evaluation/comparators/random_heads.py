"""Random clusters: what the choice of heads is worth, at the same K,V bytes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from chai_attention.clustering.assign import K_BYTES
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.profiled import profile_digest
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.support import ModelShape, describe
from chai_attention.profile import STATIC, ClusterProfile


class RandomHeads(Comparator):
    """As many clusters per layer as a profile has, with random members and representatives.

    What the profile has beside its memberships stays: how many heads go in which layer, the recent
    window, the offsets of far scores. So this row says what the choice of heads adds to those, and
    may well be ahead of recipes without them. A refit goes, as it was fitted to those
    memberships. With target "k-bytes" the K/V
    heads that keep their K are random, as many as in the profile. With target "scores" in a
    grouped-query model the K heads that are kept follow from the clusters, so that bytes may
    differ from the profile's.

    Args:
        profile: whose numbers are taken.
        seed: of the choice.
    """

    source = "control for Agarwal et al., ICML 2024 (CHAI), section 3: a random choice of heads"

    def __init__(self, profile: ClusterProfile, seed: int = 0):
        self.name = "random"
        self._from, self._seed = profile, seed

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Enable the random profile."""
        return enabled(model, self.profile_for(model))

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Share at ``length`` tokens, K of recent windows included."""
        return 1 - self.profile_for(model).saved(describe(model), length)

    def settings(self) -> Mapping[str, Any]:
        """The profile that gave the numbers, and the seed."""
        return {"profile": profile_digest(self._from), "seed": self._seed}

    def profile_for(self, model: PreTrainedModel) -> ClusterProfile:
        """Return the random profile; the same one at every call."""
        shape = describe(model)
        self._from.check(shape)
        return random_profile(self._from, shape, self._seed)


def random_profile(profile: ClusterProfile, shape: ModelShape, seed: int) -> ClusterProfile:
    """Replace a profile's memberships by random static ones of the same sizes."""
    generator = torch.Generator().manual_seed(seed)
    group = shape.group_size if profile.target == K_BYTES else 1
    layers = []
    for k in profile.clusters:
        units, kept = shape.heads // group, k // group
        chosen = torch.randperm(units, generator=generator)[:kept].sort().values
        representatives = (chosen[:, None] * group + torch.arange(group)).flatten()  # [k]
        rep = representatives[torch.randint(k, (shape.heads,), generator=generator)]
        rep[representatives] = representatives
        layers.append(tuple(rep.tolist()))
    return replace(
        profile,
        membership=STATIC,
        representatives=tuple(layers),
        features="scores",
        blend=0.0,
        costs=None,
        refit=None,
        corrections=None,
        promise=None,
        provenance={"method": "random", "seed": seed},
    )
