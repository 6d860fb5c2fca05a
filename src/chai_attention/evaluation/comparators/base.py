"""What every comparator is: a way to compute a model's attention that a table puts beside MHA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from chai_attention.progress import Progress, quiet


class Comparator(ABC):
    """One row of a quality table.

    Comparators need only be right, not fast: most of them compute what their method would keep or
    skip, without the memory or time that a serving implementation would save. They can be pickled:
    processes that score side by side get one that is prepared.

    Attributes:
        name: the row's name, which is also the name of its results.
        source: the paper and section that define the method.
        needs_cache: whether the method acts on a K,V cache that the rest of a request then uses.
            Such a method is scored in two calls: the context fills `new_cache`, the continuation
            reads it. All others are scored in one.
        rows_apart: whether that keeps the rows of a batch apart, so that contexts of one length
            may differ. Only asked of methods that need a cache.
    """

    name: str
    source: ClassVar[str]
    needs_cache: ClassVar[bool] = False
    rows_apart: ClassVar[bool] = False

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

    @abstractmethod
    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Let ``model`` compute with this method until the context ends, whatever ends it."""

    def new_cache(self, model: PreTrainedModel) -> Cache | None:
        """Return an empty cache for one batch; None for the model's own kind."""
        del model
        return None

    def looks_ahead(self, context: int) -> bool:
        """Whether tokens after a context can change what is computed for tokens before them.

        Answers of unequal length then cannot share a batch, in which padding follows the shorter.
        Only asked of methods that need a cache.

        Args:
            context: tokens that have filled the cache.
        """
        del context
        return False

    @abstractmethod
    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Return the share of MHA's K,V bytes that a serving implementation keeps.

        Args:
            model: the model, unchanged.
            length: tokens of the sequence.
        """

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Return what identifies this comparator's results, JSON values only."""
