"""CHAI and this library's own recipes: clustered heads from a `ClusterProfile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.calibrate import calibrate
from chai_attention.clustering.assign import K_BYTES
from chai_attention.errors import EvaluationError
from chai_attention.evaluation.profiled import Profiled
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import ModelShape, describe

# name -> arguments of `calibrate`
RECIPES: dict[str, dict[str, Any]] = {
    "chai": {"recipe": "paper"},
    "chai-static": {"recipe": "elbow", "cost": "scores", "membership": "static", "max_error": 1.0},
    "default": {},
    "share": {"recipe": "share"},
}


class Chai(Profiled):
    """Clustered heads, run by the library itself as they are served.

    - "chai": the paper's recipe. Clusters per layer by the elbow of the k-means error (3.2),
      memberships of every request from the attention maps of its first 5 tokens (3.3).
    - "chai-static": the same clusters per layer, but one membership for all requests, from the
      maps of the calibration text (CHAI-static of the paper's evaluation).
    - "default": what ``chai calibrate`` does without options; its ``save`` counts the exact
      windows in a context of 2,048 tokens.
    - "share": the same without streaming heads.

    In a grouped-query model clusters of query heads free K by chance only. There all of them
    choose whole K/V heads (target "k-bytes"), the first two by the paper's features, window and
    elbow.

    Args:
        name: one of the above.
        save: share of the K,V bytes per token to save, in place of the elbow and of the
            default's promise about the loss.
        seed: of the calibration.
        tokenizer: of the model, to hide facts to recall in the text; None for none.
    """

    source = "Agarwal et al., ICML 2024 (CHAI), sections 3.2 and 3.3; default: docs/guide.md"

    def __init__(
        self,
        name: str,
        save: float | None = None,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        self.name = name
        self._tokenizer = tokenizer
        self._save, self._seed = save, seed

    def prepare(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress = quiet
    ) -> None:
        """Calibrate on ``tokens``, windows of one length.

        Raises:
            CalibrationError: too little text, or a saving or promise that the model cannot keep.
        """
        windows = stacked(tokens)
        self._profile = calibrate(
            model,
            self._tokenizer,
            windows,
            samples=len(windows),
            length=windows.shape[1],
            seed=self._seed,
            source="calibration text of the evaluation",
            measure=False,  # the evaluation does
            progress=progress,
            **self._arguments(describe(model)),
        )

    def _arguments(self, shape: ModelShape) -> dict[str, Any]:
        found = dict(RECIPES[self.name])
        if self._save is not None:
            found.pop("max_error", None)
            found["save"] = self._save
        if 1 < shape.kv_heads < shape.heads:
            found["target"] = K_BYTES
        return found

    def settings(self) -> Mapping[str, Any]:
        """Recipe, budget, and the profile that came of them."""
        return {
            "recipe": RECIPES[self.name],
            "save": self._save,
            "seed": self._seed,
            **super().settings(),
        }


def stacked(tokens: Sequence[Tensor]) -> Tensor:
    """Return windows as one tensor ``[N, S]``.

    Raises:
        EvaluationError: there are none, or they differ in length.
    """
    if not tokens:
        raise EvaluationError("this comparator learns from text: give it calibration windows")
    if len({len(window) for window in tokens}) > 1:
        raise EvaluationError("calibration windows must all have the same number of tokens")
    return torch.stack(list(tokens))
