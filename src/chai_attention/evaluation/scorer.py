"""Score one comparator on one task, and record what identifies the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.recall_score import recall_score
from chai_attention.calibration.texts import windows_of
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.runs import TRANSFORMERS, Result
from chai_attention.evaluation.tasks import (
    LAMBADA,
    LAST_WORD,
    TEXT_LENGTH,
    TaskSource,
    require_text_length,
    text_length,
)
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.digest import weights_digest
from chai_attention.ops.choice import reproducible

if TYPE_CHECKING:
    from chai_attention.calibration.recall import RecallCase
    from chai_attention.integrations.lm_eval.model import ChaiLM
    from chai_attention.integrations.lm_eval.scoring import Scored

MHA = "mha"
LONG = 2048  # tokens at which K,V shares are stated beside those of the items
TEXT_TOKENS = 128 * TEXT_LENGTH  # that the windows of a perplexity task have together


class Scorer:
    """Scores comparators on tasks, with one lm-eval model and each task loaded once.

    Args:
        model: a causal language model, not enabled.
        tokenizer: its tokenizer.
        run: from `run_settings`.
        limit: items of every task; None for all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        run: Mapping[str, Any],
        limit: int | None,
    ):
        from chai_attention.integrations.lm_eval.tasks import quiet

        self._run, self._limit = run, limit
        self._model, self._tokenizer = model, tokenizer
        with quiet():
            self._lm = self._language_model()
        self._loaded: dict[str, Any] = {}

    def _language_model(self) -> ChaiLM:
        """What lm-eval asks."""
        from chai_attention.integrations.lm_eval.model import ChaiLM

        # sums of log-probabilities in bfloat16 would tie choices by rounding
        return ChaiLM(
            self._model,
            tokenizer=self._tokenizer,
            batch_size=self._run["batch_size"],
            softmax_dtype="float32",
        )

    def items(self, source: TaskSource) -> int:
        """How many items of a task are scored."""
        if source.cases:
            count = len(source.cases)
        elif text_length(source.name) is not None:
            count = len(self._load(source))
        elif source.rows is None:
            count = len(self._load(source).eval_docs)
        else:
            count = len(source.rows)
        return count if self._limit is None else min(count, self._limit)

    @reproducible()
    def score(
        self,
        method: Comparator,
        asked: Mapping[str, Any],
        source: TaskSource,
        report: Callable[[int, int], None],
    ) -> Result:
        """Score one comparator on one task.

        Args:
            method: the comparator, prepared.
            asked: its name and what it was asked for, for the record.
            source: the task.
            report: called with (requests done, requests in all).

        Raises:
            EvaluationError: lm-eval cannot run the task, or a likelihood is not a number.
            CalibrationError: a text with less than a window of tokens.
        """
        torch.manual_seed(self._run["seed"])
        with self._using(method, source):
            if source.cases:
                scored = self._recall(method, source.cases[: self._limit], report)
            else:
                scored = self._scored(source, report)
        long = min(LONG, self._lm.max_length)
        return Result(
            settings={
                "run": self._run,
                "task": source.settings(self._limit),
                "comparator": {**asked, "settings": dict(method.settings())},
            },
            source=method.source,
            kind=scored.kind,
            kv_share={
                "length": scored.length,
                "share": method.kv_share(self._model, scored.length),
                "long_length": long,
                "long_share": method.kv_share(self._model, long),
            },
            items=scored.items,
            metrics=scored.metrics,
        )

    def _using(self, method: Comparator, source: TaskSource) -> AbstractContextManager[None]:
        """Compute by a method inside the block."""
        if source.cases:
            return method.attached(self._model)
        # plain MHA is lm-eval's own path, batches and all
        return self._lm.using(None if method.name == MHA else method)

    def _scored(self, source: TaskSource, report: Callable[[int, int], None]) -> Scored:
        """A task of lm-eval's, or perplexity."""
        from chai_attention.integrations.lm_eval.scoring import score_task, score_text

        loaded = self._load(source)
        self._lm.progress = report
        if text_length(source.name) is not None:
            return score_text(self._lm, loaded[: self._limit])
        return score_task(self._lm, loaded, self._limit)

    def _recall(
        self,
        method: Comparator,
        cases: Sequence[RecallCase],
        report: Callable[[int, int], None],
    ) -> Scored:
        """Questions about texts."""
        from chai_attention.integrations.lm_eval.scoring import recalled

        correct, nll = recall_score(
            self._model,
            cases,
            method=method if method.needs_cache else None,
            batch_size=self._run["batch_size"],
            progress=report,
        )
        return recalled(cases, correct, nll)

    def _load(self, source: TaskSource) -> Any:
        """lm-eval's task, or the windows ``[N, S]`` of a text."""
        from chai_attention.integrations.lm_eval.tasks import load_task

        if source.name not in self._loaded:
            if (length := text_length(source.name)) is not None:
                self._loaded[source.name] = self._windows(source, length)
            else:
                base = LAMBADA if source.name == LAST_WORD else None
                self._loaded[source.name] = load_task(source.name, source.rows, base)
        return self._loaded[source.name]

    def _windows(self, source: TaskSource, length: int) -> Tensor:
        """Windows of a text; of the usual length, or shorter where a model reads less."""
        most = self._lm.max_length
        require_text_length(source.name, most)
        texts = [row["text"] for row in source.rows or ()]
        count = max(2, TEXT_TOKENS // length)
        return windows_of(texts, self._tokenizer, count, min(length, most), self._run["seed"])


def run_settings(
    model: PreTrainedModel, name: str, batch_size: int, seed: int, weights: str | None = None
) -> dict[str, Any]:
    """What all results of a run have in common, and what tells them from another run's.

    Args:
        model: that is evaluated.
        name: of it, for the record.
        batch_size: rows of a forward.
        seed: of everything random.
        weights: their digest, of a model that has none here.
    """
    packages = ("chai-attention", "lm_eval", "torch", "transformers")
    return {
        "model": name,
        "engine": TRANSFORMERS,
        "weights": weights_digest(model) if weights is None else weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": input_device(model).type,
        "batch_size": batch_size,
        "seed": seed,
        "versions": {name: version(name) for name in packages},
    }
