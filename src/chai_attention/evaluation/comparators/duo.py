"""DuoAttention's published patterns of streaming heads, as NVIDIA's kvpress finds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.kvpress import load_kvpress
from chai_attention.evaluation.comparators.streaming import StreamingHeads
from chai_attention.progress import Progress
from chai_attention.runtime.shape import describe

SHARE = 0.5  # of the heads that stream, without a budget: the paper's for grouped queries


class Duo(StreamingHeads):
    """Streaming heads by the gates that DuoAttention's authors trained, in our runtime.

    kvpress knows for which models there are gates, and downloads them. Their window stays that of
    the gates, whatever the profile's.

    Args:
        save: share of the K,V bytes per token to save; None for half.
    """

    name = "duo"
    source = "Xiao et al., ICLR 2025 (DuoAttention), section 3; patterns published with it"

    def __init__(self, save: float | None = None):
        super().__init__(SHARE if save is None else save)
        load_kvpress()  # raises now where it is missing

    def needs(
        self, model: PreTrainedModel, tokens: Sequence[Tensor], progress: Progress
    ) -> tuple[Tensor, tuple[int, int]]:
        """The gates.

        Raises:
            EvaluationError: none are published for the model, or they cannot be loaded.
        """
        name = model.config.name_or_path
        try:
            sinks, recent, gates = load_kvpress().DuoAttentionPress.load_attention_pattern(model)
            found = torch.as_tensor(gates).double()
        except AssertionError as error:
            raise EvaluationError(f"DuoAttention has published no pattern for {name}") from error
        except Exception as error:  # a download fails in a different way for each cause
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise EvaluationError(
                f"DuoAttention's pattern for {name} cannot be loaded ({reason})"
            ) from error
        shape = describe(model)
        if found.shape != (shape.layers, shape.kv_heads):
            raise EvaluationError(f"DuoAttention's pattern for {name} is of another model")
        return found, (int(recent), int(sinks))
