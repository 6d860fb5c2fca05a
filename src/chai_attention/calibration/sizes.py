"""How much text a calibration takes: the defaults, and numbers that are refused."""

from __future__ import annotations

from typing import TypeAlias

from transformers import PreTrainedConfig, PreTrainedModel

from chai_attention.calibration.settings import Resolved
from chai_attention.errors import CalibrationError
from chai_attention.profile import STATIC

LENGTH = 256
STREAMING_LENGTH = 1024  # far keys have to be far away
SAMPLES = 1024
GRADIENT_SAMPLES = 256  # a backward pass costs three forwards
STREAMING_SAMPLES = 64  # as many tokens
HELD_OUT = 64  # sequences on which a loss is measured
MOST_SAMPLES = 10**7
BATCH_SIZE = 8
_Described: TypeAlias = PreTrainedModel | PreTrainedConfig


def usual_length(chosen: Resolved | None = None) -> int:
    """Tokens per sequence, where the model can read as many."""
    return STREAMING_LENGTH if chosen is not None and chosen.streams else LENGTH


def usual_samples(chosen: Resolved) -> int:
    """Sequences to learn from."""
    if chosen.streams:
        return STREAMING_SAMPLES
    return GRADIENT_SAMPLES if chosen.differentiated else SAMPLES


def longest_text(model: _Described) -> int | None:
    """Tokens that a model, or one of this config, can read; None if its config does not say."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def sequence_length(
    model: _Described, chosen: Resolved | None = None, length: int | None = None
) -> int:
    """Tokens per sequence: ``length``, or what settings want and fits the model.

    Raises:
        CalibrationError: a length that the model cannot read, or that an exact or a probe window
            covers.
    """
    limit, usual = longest_text(model), usual_length(chosen)
    if length is None:
        length = min(usual, limit or usual)
    elif length < 2 or (limit is not None and length > limit):
        most = f"at most {limit}, the longest text of this model" if limit else "of any number"
        raise CalibrationError(f"length must be at least 2 and {most}, not {length}")
    if chosen is not None:
        recent = min(chosen.recents(length))
        if recent and recent + chosen.sinks >= length:
            raise CalibrationError(
                f"a recent window of {recent} + {chosen.sinks} tokens covers all {length} of a "
                "sequence: take a larger length, or a smaller recent (0 for none)"
            )
        _require_room_behind_probe(chosen, length, limit)
    return length


def _require_room_behind_probe(chosen: Resolved, length: int, limit: int | None) -> None:
    """Refuse a probe window behind which no head shares: a loss measured so would always be 0."""
    if chosen.membership == STATIC:
        return
    end = chosen.probe_start + chosen.window
    if chosen.holds_out and end + 1 >= length:  # the last token of a sequence predicts none of it
        raise CalibrationError(
            f"memberships are decided by the first {end} tokens, which leaves nothing to measure "
            f"of sequences of {length}: take a larger length, or a smaller window"
        )
    if limit is not None and end + 1 >= limit:
        raise CalibrationError(
            f"memberships are decided by the first {end} tokens, and this model reads {limit}: "
            "take a smaller window"
        )


def check_numbers(samples: int, seed: int) -> None:
    """Refuse numbers of sequences and seeds that cannot be used.

    Raises:
        CalibrationError: one of them is out of range.
    """
    if samples < 1:
        raise CalibrationError(f"calibration needs at least 1 sample, not {samples}")
    if samples > MOST_SAMPLES:
        raise CalibrationError(f"calibration takes at most {MOST_SAMPLES:,} samples, not {samples}")
    if not 0 <= seed < 2**64:
        raise CalibrationError(f"a seed is a whole number from 0 to 2^64 - 1, not {seed}")
