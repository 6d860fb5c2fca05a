"""Scores of questions about a text: whether the whole answer is right, and its likelihood."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.methods import Method, cached_logits
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.ops.choice import reproducible
from chai_attention.progress import Report, silent

if TYPE_CHECKING:
    from chai_attention.calibration.recall import RecallCase

MOST_TOKENS = 1 << 14  # of a forward, unless one case has more


@torch.no_grad()
@reproducible()
def recall_score(
    model: PreTrainedModel,
    cases: Sequence[RecallCase],
    *,
    method: Method | None = None,
    batch_size: int = 16,
    most_tokens: int | None = None,
    progress: Report = silent,
) -> tuple[Tensor, Tensor]:
    """Score the answers to questions about texts.

    An answer is right if each of its tokens is the likeliest one behind those before it: then
    greedy decoding writes it, so nothing has to be generated. The model runs in eval mode, and is
    left in the mode it was in.

    Args:
        model: a causal language model, clustered heads enabled or not.
        cases: N questions, from `recall_cases`.
        method: attached to the model, and acts on its cache: prompts are then read by one call,
            answers by a second, one case at a time unless its ``rows_apart``. None: everything in
            one call.
        batch_size: cases of a forward, at most; fewer where they are long.
        most_tokens: of a forward, unless one case has more; None for 16,384.
        progress: called with (cases done, cases in all).

    Returns:
        ``(correct [N] bool, nll [N] float32)`` on the CPU; ``nll`` is the negative log-likelihood
        of the whole answer in nats.

    Raises:
        EvaluationError: with ``method``, the model returns no cache.
    """
    correct = torch.zeros(len(cases), dtype=torch.bool)
    nll = torch.zeros(len(cases))
    done = 0
    with evaluating(model):
        for chosen in _batches(cases, method, batch_size, most_tokens or MOST_TOKENS):
            answers = [cases[index].answer for index in chosen]
            rows = [torch.cat([cases[index].prompt, cases[index].answer])[:-1] for index in chosen]
            longest = max(map(len, answers))
            tokens = torch.stack(rows).to(input_device(model))
            if method is None:
                logits = _logits(model, tokens, longest)
            else:
                logits = cached_logits(model, method, tokens, longest)
            for index, answer, row in zip(chosen, answers, logits, strict=True):
                scores = row[-len(answer) :].float().log_softmax(-1).cpu()  # [A, vocabulary]
                correct[index] = bool((scores.argmax(-1) == answer).all())
                nll[index] = -scores.gather(1, answer[:, None]).sum()
            done += len(chosen)
            progress(done, len(cases))
    return correct, nll


def _batches(
    cases: Sequence[RecallCase], method: Method | None, batch_size: int, most_tokens: int
) -> list[list[int]]:
    """Numbers of cases that go through the model together: all of one length, without padding.

    With a method, their prompts are of one length, too.
    """
    if method is not None and not method.rows_apart:
        return [[index] for index in range(len(cases))]
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        length = len(case.prompt) + len(case.answer)
        groups[length, 0 if method is None else len(case.answer)].append(index)
    found = []
    for (length, _), group in groups.items():
        rows = max(1, min(batch_size, most_tokens // length))
        found += [group[start : start + rows] for start in range(0, len(group), rows)]
    return found


def _logits(model: PreTrainedModel, tokens: Tensor, count: int) -> Tensor:
    """Predictions at the last ``count`` tokens of ``tokens [B, S]``: ``[B, count, vocabulary]``."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count  # those of all tokens would fill the memory
    logits: Tensor = model(tokens, **options).logits[:, -count:]
    return logits
