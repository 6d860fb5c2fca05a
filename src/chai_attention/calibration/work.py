"""What a calibration takes of a device's memory beside the model, known before it is loaded."""

from __future__ import annotations

from transformers import PreTrainedConfig

from chai_attention.calibration.calibrate import (
    BATCH_SIZE,
    DEFAULT_LENGTH,
    STREAMING_LENGTH,
)
from chai_attention.calibration.settings import Settings
from chai_attention.integrations.transformers.logits import rows_at_once
from chai_attention.integrations.transformers.room import Work, WorkOf
from chai_attention.integrations.transformers.support import describe


def work_of(settings: Settings, length: int | None) -> WorkOf:
    """Return what tells, from a model's config, how much a calibration needs.

    Args:
        settings: as they were asked for.
        length: tokens per window; None for the settings' own.
    """

    def work(config: PreTrainedConfig) -> Work:
        chosen = settings.resolve(describe(config))
        tokens = length or (STREAMING_LENGTH if chosen.streams else DEFAULT_LENGTH)
        rows = rows_at_once(BATCH_SIZE, tokens)
        if chosen.differentiated:
            rows = max(1, rows // 2)
        return Work(rows * tokens, gradients=chosen.differentiated, length=tokens)

    return work
