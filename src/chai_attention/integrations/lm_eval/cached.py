"""Scoring a method that acts on the K,V cache: the context fills it, answers read it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.errors import EvaluationError
from chai_attention.integrations.transformers.devices import input_device

if TYPE_CHECKING:
    from chai_attention.evaluation.comparators.base import Comparator


@torch.no_grad()
def cached_logits(
    model: PreTrainedModel, method: Comparator, tokens: Tensor, answer: int
) -> Tensor:
    """Predict the last tokens of sequences with one context in two calls, through a cache.

    The first call reads all of the context but its last token, so that every prediction that is
    scored, that of a one-token answer too, comes from a query which reads the finished cache. A
    context of one token is read by the first call.

    Args:
        model: the model, with the method attached.
        method: makes the cache.
        tokens: ``[R, S]`` int64, context and answer without the answer's last token. The context
            is the same in all rows, or of one length where the method keeps rows apart
            (`Comparator.rows_apart`). Shorter answers may be followed by any tokens, unless the
            method lets later tokens change earlier ones (`Comparator.looks_ahead`).
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
