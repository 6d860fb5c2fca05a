"""The base class of comparators: methods that a quality table sets beside full attention (MHA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.methods import Method
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import ModelShape, describe


class Comparator(Method):
    """One row of a quality table: a method, its name and its source.

    Comparators need only be right, not fast: most of them compute what their method would keep or
    skip, without the memory or time that a serving implementation would save. They can be pickled:
    processes that score side by side get one that is prepared.

    Attributes:
        name: the row's name, which is also the name of its results.
        source: the paper and section that define the method.
    """

    source: str

    def prepare(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress = quiet
    ) -> None:
        """Fit what the method learns offline; the same input gives the same result.

        Args:
            model: a causal language model, not yet changed.
            tokens: calibration windows, each ``[S]`` int64, which the test items are not part of.
            progress: called with (what is going on, done, in all).
        """
        del model, tokens, progress

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Change nothing of the model, as where the method is all in its cache."""
        return nullcontext()

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Return the share of MHA's K,V bytes that a serving implementation keeps; here, all.

        Args:
            model: the model, unchanged.
            length: tokens of the sequence.
        """
        return 1.0

    def settings(self) -> Mapping[str, Any]:
        """Return what identifies this comparator's results, JSON values only; here, nothing."""
        return {}


def shape_of(model: PreTrainedModel, name: str) -> ModelShape:
    """Return the shape of a model, for a method that knows full attention only.

    Raises:
        UnsupportedModelError: the model has sliding-window layers.
    """
    shape = describe(model)
    if not all(shape.clusterable):
        raise UnsupportedModelError(
            f"{name} is a method for full attention, and this model has sliding-window layers: "
            "leave it out of the comparison"
        )
    return shape
