"""Other ways to compute a model's attention, and predictions through their K,V caches."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from chai_attention.errors import EvaluationError
from chai_attention.integrations.transformers.devices import input_device


class Method(ABC):
    """A way to compute a model's attention, attached for the time of a ``with`` block.

    Attributes:
        name: what errors call it.
        needs_cache: whether the method acts on a K,V cache that the rest of a request then uses.
            Such a method is scored in two calls: the context fills `new_cache`, the continuation
            reads it. All others are scored in one.
        rows_apart: whether that keeps the rows of a batch apart, so that contexts of one length
            may differ. Only asked of methods that need a cache.
    """

    name: str
    needs_cache: ClassVar[bool] = False
    rows_apart: ClassVar[bool] = False

    @abstractmethod
    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Let ``model`` compute with this method until the context ends, whatever ends it."""

    def new_cache(self, model: PreTrainedModel) -> Cache | None:
        """Return an empty cache for one batch; None for the model's own kind."""
        return None

    def looks_ahead(self, context: int) -> bool:
        """Whether tokens after a context can change what is computed for tokens before them.

        Answers of unequal length then cannot share a batch, in which padding follows the shorter.
        Only asked of methods that need a cache.

        Args:
            context: tokens that have filled the cache.
        """
        return False


@torch.no_grad()
def cached_logits(model: PreTrainedModel, method: Method, tokens: Tensor, answer: int) -> Tensor:
    """Predict the last tokens of sequences with one context in two calls, through a cache.

    The first call reads all of the context but its last token, so that every prediction that is
    scored, that of a one-token answer too, comes from a query which reads the finished cache. A
    context of one token is read by the first call.

    Args:
        model: the model, with the method attached.
        method: makes the cache.
        tokens: ``[R, S]`` int64, context and answer without the answer's last token. The context
            is the same in all rows, or of one length where the method keeps rows apart
            (`Method.rows_apart`). Shorter answers may be followed by any tokens, unless the
            method lets later tokens change earlier ones (`Method.looks_ahead`).
        answer: how many predictions are wanted; those at the last ``answer`` tokens.

    Returns:
        Logits ``[R, answer, vocabulary]`` in the model's dtype.

    Raises:
        EvaluationError: the model returns no cache.
    """
    length = tokens.shape[1]
    split = tokens_before_answers(length - answer + 1)
    parameters = inspect.signature(model.forward).parameters
    takes_positions = "position_ids" in parameters
    cache = method.new_cache(model)
    parts = []
    for start, end in ((0, split), (split, length)):
        if start == end:
            continue
        options: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
        if takes_positions:
            # a cache that evicts tokens is shorter than the text before the next token
            options["position_ids"] = torch.arange(start, end, device=input_device(model))[None]
        if "logits_to_keep" in parameters:
            options["logits_to_keep"] = answer  # those of all tokens would fill the memory
        out = model(tokens[:, start:end].to(input_device(model)), **options)
        cache = out.past_key_values
        if cache is None:
            raise EvaluationError(f"{method.name} needs a model that returns its K,V cache")
        parts.append(out.logits[:, -answer:])
    return torch.cat(parts, dim=1)[:, -answer:]


def tokens_before_answers(context: int) -> int:
    """How many tokens of a context the first call reads."""
    return max(1, context - 1)
