"""Comparators that are a `ClusterProfile`, which the library itself runs as it is served."""

from __future__ import annotations

from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe


class WithProfile(Comparator):
    """Base of methods whose `prepare` finds a profile."""

    _profile: ClusterProfile | None = None

    @property
    def profile(self) -> ClusterProfile:
        """What `prepare` found.

        Raises:
            EvaluationError: it has not been called.
        """
        if self._profile is None:
            raise EvaluationError(f"prepare the comparator {self.name} first: it needs a profile")
        return self._profile

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Enable the profile."""
        return enabled(model, self.profile)

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Share at ``length`` tokens, near K and V included."""
        return 1 - self.profile.saved(describe(model), length)
