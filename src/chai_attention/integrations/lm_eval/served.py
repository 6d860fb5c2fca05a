"""lm-eval's `hf` model without weights: its requests go to an engine that has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.integrations.lm_eval.model import Answer, ChaiLM, TokenRequest


class TokenScorer(Protocol):
    """What scores tokens, such as `integrations.vllm.scoring.ScoringEngine`."""

    def score(
        self, requests: Sequence[tuple[Sequence[int], int]], progress: Callable[[int], None]
    ) -> list[Answer]:
        """Score the last tokens of each row: (log-likelihood, is it the greedy one)."""


class ServedLM(ChaiLM):
    """Tasks with lm-eval's own prompts, tokens and truncation, and an engine's log-likelihoods.

    Args:
        model: a model on the device "meta" (`load_skeleton`).
        engine: makes what scores, given the tokens of the longest input.
        options: further arguments of `hf`, such as ``tokenizer``.
    """

    def __init__(
        self, model: PreTrainedModel, engine: Callable[[int], TokenScorer], **options: Any
    ):
        super().__init__(model, **options)
        self._engine = engine

    def score_ends(self, windows: Tensor, start: int) -> list[float]:
        """Log-likelihood of the tokens of each window ``[N, S]`` from ``start`` on."""
        return self._ends_as_requests(windows, start)

    def _loglikelihood_tokens(
        self,
        requests: list[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        self._take(requests)
        # the model reads all tokens but the last, at most `max_length`
        rows = [(context + answer)[-(self.max_length + 1) :] for _, context, answer in requests]
        self._done, self._total = 0, len(rows)
        engine = self._engine(max(map(len, rows)) - 1)
        answers = [(row, len(answer)) for row, (_, _, answer) in zip(rows, requests, strict=True)]
        return engine.score(answers, lambda done: self._advance(done - self._done))
