"""The unchanged model: what every other row of a table is compared to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import PreTrainedModel

from chai_attention.evaluation.comparators.base import Comparator


class Mha(Comparator):
    """Every head with its own scores, in the attention that the model was loaded with.

    Of a grouped-query model this is its grouped-query attention: K,V bytes of all comparators are
    shares of what the model itself keeps.
    """

    source = "Vaswani et al. 2017, section 3.2: the model as it is"

    def __init__(self) -> None:
        self.name = "mha"

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Change nothing."""
        return nullcontext()

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """All bytes."""
        return 1.0

    def settings(self) -> Mapping[str, Any]:
        """There are none."""
        return {}
