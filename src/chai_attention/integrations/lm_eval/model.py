"""The model "chai" of lm-evaluation-harness: its `hf` model with clustered heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.errors import EvaluationError
from chai_attention.hub import is_gguf
from chai_attention.integrations.lm_eval import NAME
from chai_attention.integrations.transformers import enable
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.logits import (
    LOGITS,
    rows_at_once,
    token_losses,
)
from chai_attention.integrations.transformers.methods import (
    Method,
    cached_logits,
    tokens_before_answers,
)
from chai_attention.profile import ClusterProfile

# (texts, tokens of the context, tokens of the continuation), as lm-eval hands them on
TokenRequest = tuple[Any, list[int], list[int]]
Answer = tuple[float, bool]


@register_model(NAME)
class ChaiLM(HFLM):
    """lm-eval's `hf` model with a cluster profile, or with a comparator's method.

    Without either it is `hf` itself, number for number. With one of them, a batch holds inputs of
    one length only: `hf` pads shorter ones and tells the model nothing about it, which causal
    attention never sees, but a method would that looks at first tokens, last tokens or whole
    sequences. So no result depends on what else is in its batch, but for rounding.

    Args:
        pretrained: a folder, a name on the hub, a ``.gguf`` file, smollm2-135m, or a loaded model
            (with ``tokenizer``).
        profile: a cluster profile, its file, or the name of a published schedule; the model stays
            enabled with it (see `disable`). None: the model as it is.
        device: as for `hf`; where there is no GPU, the CPU.
        dtype: as for `hf`; "auto" of a ``.gguf`` file is bfloat16 on a GPU, else float32.
        options: further arguments of `hf`, such as ``batch_size``, ``max_length``,
            ``softmax_dtype``.

    Raises:
        EvaluationError: ``batch_size=auto`` with a profile, or an encoder-decoder.
        ProfileError, UnsupportedModelError: from `enable`.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        profile: ClusterProfile | str | Path | None = None,
        *,
        device: str | None = "cuda",
        dtype: str | torch.dtype | None = "auto",
        **options: Any,
    ):
        if isinstance(pretrained, str) and is_gguf(pretrained):
            pretrained, options["tokenizer"] = _load(pretrained, device, dtype)
        super().__init__(pretrained=pretrained, device=device, dtype=dtype, **options)
        self._device = input_device(self.model)  # of a model in parts, that of its first
        self.progress: Callable[[int, int], None] | None = None
        self.lengths: dict[Any, tuple[int, int]] = {}
        self._method: Method | None = None
        self._profiled = profile is not None
        self._done = self._total = 0
        if profile is not None:
            self._refuse_unknown_batches()
            enable(self.model, profile)

    @contextmanager
    def using(self, method: Method | None) -> Iterator[None]:
        """Score with a comparator's method inside a ``with`` block; None: the model as it is."""
        if method is None:
            yield
            return
        self._refuse_unknown_batches()
        self._method = method
        try:
            with method.attached(self.model):
                yield
        finally:
            self._method = None

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Answer]:
        """Score (context, continuation) texts; with `progress` set, lm-eval's bars are off."""
        return super().loglikelihood(requests, disable_tqdm or self.progress is not None)

    def score_tokens(self, requests: Sequence[TokenRequest]) -> list[Answer]:
        """Score continuations that are tokens already: (log-likelihood, is it the greedy one)."""
        return self._loglikelihood_tokens(list(requests), disable_tqdm=True)

    def score_ends(self, windows: Tensor, start: int) -> list[float]:
        """Log-likelihood of the tokens of each window ``[N, S]`` from ``start`` on.

        Windows may be as long as the model reads: batches and logits are bounded by tokens.
        """
        if self._method is not None and self._method.needs_cache:
            return self._ends_as_requests(windows, start)
        self._done, self._total = 0, len(windows)
        found: list[float] = []
        for batch in windows.split(rows_at_once(int(self.batch_size), windows.shape[1])):
            losses = token_losses(self.model, batch.to(input_device(self.model)))[:, start - 1 :]
            found += (-losses.double().sum(1)).tolist()
            self._advance(len(batch))
        return found

    def _ends_as_requests(self, windows: Tensor, start: int) -> list[float]:
        requests = [((i,), row[:start], row[start:]) for i, row in enumerate(windows.tolist())]
        return [value for value, _ in self.score_tokens(requests)]

    def _loglikelihood_tokens(
        self,
        requests: list[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        self._take(requests)
        self._done, self._total = 0, len({tuple(c + a[:-1]) for _, c, a in requests})
        if self._method is not None and self._method.needs_cache:
            return self._through_cache(requests, self._method)
        if self._method is None and not self._profiled:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        groups: dict[int, list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            groups[min(len(context) + len(continuation) - 1, self.max_length)].append(index)
        answers: dict[int, Answer] = {}
        for length in sorted(groups, reverse=True):  # what takes most memory comes first
            chosen = [requests[index] for index in groups[length]]
            found = super()._loglikelihood_tokens(chosen, disable_tqdm, override_bs)
            answers.update(zip(groups[length], found, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _take(self, requests: list[TokenRequest]) -> None:
        """Keep the lengths of requests, and refuse those that no model of this length can score."""
        for texts, context, continuation in requests:
            self.lengths[texts] = len(context), len(continuation)
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"an answer of {len(continuation)} tokens is longer than the model's maximum "
                    f"of {self.max_length}"
                )

    def _through_cache(self, requests: list[TokenRequest], method: Method) -> list[Answer]:
        """Score the answers to one context at a time, each with a row of one cache."""
        # context -> answer without its last token -> numbers of requests: one-token answers are
        # one row, whatever the token
        contexts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            if len(continuation) >= len(whole):
                raise EvaluationError(
                    f"an answer of {len(continuation)} tokens leaves no context in the model's "
                    f"{self.max_length}"
                )
            start = len(whole) - len(continuation)
            rows = contexts.setdefault(tuple(whole[:start]), {})
            rows.setdefault(tuple(whole[start:-1]), []).append(index)
        answers: dict[int, Answer] = {}
        for asked, rows in contexts.items():
            for batch in self._batches(asked, list(rows), method):
                longest = max(map(len, batch))
                # what follows a shorter answer is never looked at
                padded = [[*asked, *row, *[0] * (longest - len(row))] for row in batch]
                logits = cached_logits(self.model, method, torch.tensor(padded), longest + 1)
                for row, scores in zip(batch, logits, strict=True):
                    for index in rows[row]:
                        answers[index] = self._answer(scores[: len(row) + 1], requests[index][2])
                self._advance(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _answer(self, logits: Tensor, continuation: list[int]) -> Answer:
        """Score a continuation by its logits ``[A, vocabulary]``, some tokens at a time."""
        wanted = torch.tensor(continuation, device=logits.device)
        total, greedy = 0.0, True
        step = max(1, LOGITS // logits.shape[1])
        for scores, target in zip(logits.split(step), wanted.split(step), strict=True):
            scores = F.log_softmax(scores, dim=-1, dtype=self.softmax_dtype)
            total += float(scores.gather(1, target[:, None]).sum())
            greedy = greedy and bool((scores.argmax(1) == target).all())
        return total, greedy

    def _batches(
        self, context: tuple[int, ...], rows: list[tuple[int, ...]], method: Method
    ) -> Iterator[list[tuple[int, ...]]]:
        """Deal the answers to one context to calls; of one length where padding would be seen."""
        groups: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        apart = method.looks_ahead(tokens_before_answers(len(context)))
        for row in rows:
            groups[len(row) if apart else 0].append(row)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *args, **kwargs)
        self._advance(len(inps))
        return logits

    def _advance(self, rows: int) -> None:
        self._done = min(self._done + rows, self._total)
        if self.progress is not None:
            self.progress(self._done, self._total)

    def _refuse_unknown_batches(self) -> None:
        if self.backend != "causal":
            raise EvaluationError("clustered heads are for causal language models")
        if self.batch_size == "auto":
            raise EvaluationError(
                "batch_size=auto is measured on padded batches, which a profile does not get: "
                "give a number"
            )


def _load(name: str, device: str | None, dtype: str | torch.dtype | None) -> tuple[Any, Any]:
    """A ``.gguf`` file as the command line loads it, which counts as a plain model."""
    from chai_attention.integrations.transformers.loading import load_model

    on_gpu = device is not None and device.startswith("cuda")
    chosen = "auto" if device is None or (on_gpu and not torch.cuda.is_available()) else device
    return load_model(name, str(dtype or "auto").removeprefix("torch."), chosen)
