"""Models and tokens that cannot be calibrated, refused before hours are spent."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.perplexity import token_loss
from chai_attention.errors import CalibrationError


def require_tokens(model: PreTrainedModel, sequences: Tensor) -> None:
    """Refuse token ids that the model has no embedding for; on a GPU they would end the process.

    Raises:
        CalibrationError: names the first such id.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    strange = sequences[(sequences < 0) | (sequences >= rows)]
    if len(strange):
        raise CalibrationError(
            f"the text has the token id {strange[0].item()}, and this model embeds ids 0 to "
            f"{rows - 1}: its tokenizer is that of another model, or has tokens that were added "
            "without model.resize_token_embeddings"
        )


def require_finite(model: PreTrainedModel, sequence: Tensor) -> None:
    """Refuse a model whose loss on a sequence ``[1, S]`` of text is no number.

    Raises:
        CalibrationError: says which weights are to blame, or that it is the dtype.
    """
    if not token_loss(model, sequence).finite:
        raise not_finite(model, "the loss of this model on the text")


def not_finite(model: PreTrainedModel, what: str) -> CalibrationError:
    """Say why ``what`` is not a number."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            return CalibrationError(
                f"{what} is not a number: the weight {name} holds NaN or infinity, load the model "
                "from an intact checkpoint"
            )
    dtype = str(model.dtype).removeprefix("torch.")
    wider = "bfloat16 or float32" if model.dtype == torch.float16 else "float32"
    return CalibrationError(
        f"{what} is not a number although its weights are: {dtype} overflows, load it in {wider}"
    )
