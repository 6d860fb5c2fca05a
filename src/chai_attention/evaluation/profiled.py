"""Comparators that are a cluster profile, run by the library itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import PreTrainedModel

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import STATIC, ClusterProfile
from chai_attention.results import digest
from chai_attention.runtime.shape import describe

PROFILE = "profile"
NO_PROFILE = f"the comparator {PROFILE} needs a profile: --profile FILE"


class Profiled(Comparator):
    """The model with a profile: the one that is evaluated, or one that `prepare` finds.

    Args:
        profile: any profile that fits the model; None: `prepare` finds it.
    """

    name = PROFILE
    source = "Agarwal et al. 2024, section 3, with the recipe that the profile was made by"

    def __init__(self, profile: ClusterProfile | None = None):
        self._profile = profile

    @property
    def profile(self) -> ClusterProfile:
        """The profile.

        Raises:
            EvaluationError: `prepare`, which finds it, has not been called.
        """
        if self._profile is None:
            raise EvaluationError(f"prepare the comparator {self.name} first: it needs a profile")
        return self._profile

    def profile_for(self, model: PreTrainedModel) -> ClusterProfile:
        """Return what ``model`` is run with."""
        return self.profile

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Enable the profile."""
        return enabled(model, self.profile_for(model))

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Share of the K,V bytes at ``length`` tokens, local K and V included."""
        return 1 - self.profile_for(model).saved(describe(model), length)

    def settings(self) -> Mapping[str, Any]:
        """The profile's digest, and its clusters and streaming heads per layer."""
        counts: dict[str, Any] = {"clusters": list(self.profile.clusters)}
        if self.profile.streaming is not None:
            counts["streaming"] = [len(heads) for heads in self.profile.streaming]
        return {"profile": profile_digest(self.profile), **counts}


class LowBitCache(Comparator):
    """K and V in numbers of fewer bits: of all heads, or what clustered heads keep.

    Local K and V of heads that share or stream stay in 16 bits.

    Args:
        name: of the method; "chai+" is put before it where there are clusters.
        profile: the clusters; None for all heads.
    """

    needs_cache = True

    def __init__(self, name: str, profile: ClusterProfile | None):
        self.name = name if profile is None else f"chai+{name}"
        self._profile = profile

    @abstractmethod
    def number_share(self, model: PreTrainedModel) -> float:
        """Return the share of a server's bytes for a number that one takes."""

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Enable the profile, if there is one: the cache does the rest."""
        return nullcontext() if self._profile is None else enabled(model, self._profile)

    def looks_ahead(self, context: int) -> bool:
        """Where the context is too short to decide memberships, the answer helps to do so."""
        profile = self._profile
        return profile is not None and profile.membership != STATIC and context < profile.probe_end

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Share of the K and V of a prompt of ``length`` tokens."""
        share = self.number_share(model)
        return (
            share if self._profile is None else low_bit_share(self._profile, model, length, share)
        )

    def settings(self) -> Mapping[str, Any]:
        """The profile, if there is one."""
        return {} if self._profile is None else {"profile": profile_digest(self._profile)}


def low_bit_share(
    profile: ClusterProfile, model: PreTrainedModel, length: int, share: float
) -> float:
    """Share of MHA's K,V bytes where what clustered heads keep takes ``share`` of its bytes.

    But for local K and V of heads that share or stream, which stay as they are.
    """
    full, far, local = profile.held(describe(model), length)
    return (far * share + local) / full


def profile_digest(profile: ClusterProfile) -> str:
    """Return a short digest of a profile's contents."""
    return digest(profile.to_json())
