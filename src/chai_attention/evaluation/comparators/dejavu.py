"""DejaVu-style contextual head sparsity: for every token, the heads that matter least are left out.

What is as in DejaVu: a small MLP per layer predicts from the token which heads matter, where a head
matters by the norm of its output, and the others are left out of that token's output alone.

What differs, to the method's favour: the predictor reads the input of its own layer, where the
original looks one layer ahead so that predicting overlaps with computing, and K,V of a token are
computed for all heads, where the original leaves gaps for heads that the token did not use. The
oracle drops by the true importance, which needs all heads to be computed, and bounds what any
predictor of it can reach. Sparsity of MLP blocks is left out: this compares ways to save attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.comparators.head_predictor import (
    EPOCHS,
    SAMPLES,
    WIDTH,
    HeadPredictors,
    Importance,
)
from chai_attention.integrations.transformers.intervene import edited_heads
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import describe


class DejaVu(Comparator):
    """A share of the heads left out of every token's output, by predicted importance.

    It saves work and no K,V bytes: which heads a later token will need is not known, so K and V of
    all of them stay.

    Args:
        share: of the heads to leave out, above 0 and below 1.
        predictors: fitted once for all shares; None for the oracle.

    Raises:
        EvaluationError: a share that is none.
    """

    source = "Liu et al., ICML 2023 (Deja Vu), contextual sparsity of attention heads"

    def __init__(self, share: float, predictors: HeadPredictors | None):
        if not 0 < share < 1:
            raise EvaluationError(f"a share of heads is above 0 and below 1, not {share:g}")
        kind = "dejavu-oracle" if predictors is None else "dejavu"
        self.name = f"{kind}-{round(100 * share)}"
        self._share, self._predictors = share, predictors

    def prepare(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress = quiet
    ) -> None:
        """Train the predictors, unless another share has done so."""
        if self._predictors is not None and not self._predictors.fitted:
            self._predictors.fit(model, tokens, progress)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Leave heads out until the context ends."""
        shape = describe(model)
        drops = drops_per_layer(self._share, shape.layers, shape.heads)
        predict = self._predictors
        if predict is None:
            truth = Importance(model)
            with edited_heads(
                model, lambda layer, out: without_least(out, truth(layer, out), drops[layer])
            ):
                yield
            return
        if not predict.fitted:
            raise EvaluationError(f"prepare the comparator {self.name} first: it has predictors")
        expected: dict[int, Tensor] = {}

        def see(layer: int, hidden: Tensor) -> None:
            expected[layer] = predict(layer, hidden)

        def edit(layer: int, out: Tensor) -> Tensor:
            return without_least(out, expected.pop(layer), drops[layer])

        with edited_heads(model, edit, see):
            yield

    def settings(self) -> Mapping[str, Any]:
        """The share, and how predictors are trained."""
        if self._predictors is None:
            return {"share": self._share}
        return {
            "share": self._share,
            "seed": self._predictors.seed,
            "samples": SAMPLES,
            "width": WIDTH,
            "epochs": EPOCHS,
        }


def drops_per_layer(share: float, layers: int, heads: int) -> list[int]:
    """Heads to leave out of each layer, differing by at most one, ``share`` of all in total.

    A tenth of nine heads is not a number of heads; the tenth of the heads of all layers is.
    """
    totals = [int(share * heads * layer + 0.5) for layer in range(layers + 1)]
    return [after - before for before, after in pairwise(totals)]


def without_least(out: Tensor, importance: Tensor, drop: int) -> Tensor:
    """Zero the ``drop`` least important heads of every token; of equal ones the later go.

    Args:
        out: heads' outputs, ``[B, Q, H, Dv]``.
        importance: ``[B, Q, H]``.
        drop: how many.
    """
    if not drop:
        return out
    order = importance.argsort(dim=-1, descending=True, stable=True)
    return out.masked_fill(
        torch.zeros_like(importance, dtype=torch.bool)
        .scatter(-1, order[..., -drop:], True)
        .unsqueeze(-1),
        0.0,
    )
