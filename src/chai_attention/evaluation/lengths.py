"""Checks the lengths of an evaluation's texts before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from chai_attention.calibration.sizes import longest_text
from chai_attention.calibration.work import config_of
from chai_attention.evaluation.recall_tasks import recall_lengths, require_recall_length
from chai_attention.evaluation.tasks import RECALL, TEXT_LENGTH, require_text_length, text_length


def require_lengths(
    model: str,
    tasks: Sequence[str],
    lengths: Sequence[int] | None,
    *,
    trust_remote_code: bool = False,
) -> list[int]:
    """Refuse tasks whose texts are longer than a model reads; return the tokens of all texts.

    Args:
        model: its name.
        tasks: names.
        lengths: of the task recall; None for `recall_lengths`.
        trust_remote_code: run code that the model's config comes with.

    Raises:
        EvaluationError: names the task.
        LoadError: no such model.
    """
    found = [TEXT_LENGTH]
    longer = [task for task in tasks if task == RECALL or text_length(task) is not None]
    config = config_of(model, trust_remote_code=trust_remote_code) if longer else None
    context = None if config is None else longest_text(config)
    for task in longer:
        if task == RECALL:
            wanted = lengths or (recall_lengths(context) if config is not None else ())
            for length in wanted:
                require_recall_length(length, context)
            found += wanted
        else:
            require_text_length(task, context)
            found.append(text_length(task) or TEXT_LENGTH)
    return found
