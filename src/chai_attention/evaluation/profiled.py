"""A cluster profile as a row of a quality table."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel

from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import STATIC, ClusterProfile, sliding_bytes
from chai_attention.results import digest
from chai_attention.runtime.shape import describe

PROFILE = "profile"


class Profiled(Comparator):
    """The model with the profile that is evaluated, by the library itself, as it is served.

    Args:
        profile: any profile that fits the model.
    """

    source = "Agarwal et al. 2024, section 3, with the recipe that the profile was made by"

    def __init__(self, profile: ClusterProfile):
        self.name = PROFILE
        self._profile = profile

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Enable the profile."""
        return enabled(model, self._profile)

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Share of the K,V bytes at ``length`` tokens, near K and V included."""
        return 1 - self._profile.saved(describe(model), length)

    def settings(self) -> Mapping[str, Any]:
        """The profile's digest, and its clusters and streaming heads per layer."""
        return {"profile": profile_digest(self._profile), **head_counts(self._profile)}


def decides_late(profile: ClusterProfile, context: int) -> bool:
    """Whether a context is too short to decide memberships, which later tokens then do."""
    return profile.membership != STATIC and context < profile.probe_start + profile.window


def narrowed_share(
    profile: ClusterProfile, model: PreTrainedModel, length: int, share: float
) -> float:
    """Share of MHA's K,V bytes where what clustered heads keep takes ``share`` of its bytes.

    But for near K and V of heads that share or stream, which stay as they are.
    """
    shape = describe(model)
    full, kept = profile.bytes_per_token(shape, 1)
    sliding = sliding_bytes(shape, 1, length)
    clustered = (kept * length + sliding) / (full * length + sliding)
    window = 1 - profile.saved(shape, length) - clustered
    return clustered * share + window


def head_counts(profile: ClusterProfile) -> dict[str, Any]:
    """Clusters per layer, and streaming heads where there are any, for the record."""
    counts: dict[str, Any] = {"clusters": list(profile.clusters)}
    if profile.streaming is not None:
        counts["streaming"] = [len(heads) for heads in profile.streaming]
    return counts


def profile_digest(profile: ClusterProfile) -> str:
    """Return a short digest of a profile's contents."""
    return digest(profile.to_json())
