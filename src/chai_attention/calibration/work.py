"""Memory that calibration needs, and texts that a model can read, before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from transformers import PreTrainedConfig

from chai_attention.calibration.settings import Settings
from chai_attention.calibration.sizes import BATCH_SIZE, sequence_length, usual_length
from chai_attention.hub import is_gguf
from chai_attention.integrations.transformers.logits import rows_at_once
from chai_attention.integrations.transformers.room import Work, WorkOf
from chai_attention.runtime.shape import describe
from chai_attention.runtime.skeleton import load_config


def work_of(settings: Settings, length: int | None) -> WorkOf:
    """Return a function that estimates, from a model's config, what a calibration needs.

    Args:
        settings: as they were asked for.
        length: tokens per sequence; None for the settings' own.
    """

    def work(config: PreTrainedConfig) -> Work:
        chosen = settings.resolve(describe(config))
        tokens = length or usual_length(chosen)
        batch = BATCH_SIZE // 2 if chosen.differentiated else BATCH_SIZE
        rows = rows_at_once(batch, tokens)
        return Work(rows * tokens, gradients=chosen.differentiated, length=tokens)

    return work


def reading_work(
    lengths: Iterable[int], batch_size: int, studied: int = 0, gradients: bool = False
) -> WorkOf:
    """Return a function that estimates what forwards over texts, and a study of them, need.

    Args:
        lengths: tokens of the texts.
        batch_size: of them in a forward, at most.
        studied: tokens of sequences whose attention maps are looked at; 0 for none.
        gradients: whether they are differentiated.
    """
    most = max(rows_at_once(batch_size, length) * length for length in (*lengths, studied or 1))
    return partial(_constant, Work(most, gradients=gradients, length=studied))


def _constant(work: Work, config: PreTrainedConfig) -> Work:
    """The same work for every model; a function of a module, so that it can be pickled."""
    return work


def config_of(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig | None:
    """Return a model's config, to look at before the model is loaded; None for ``.gguf`` files.

    Reading these takes nearly as long as loading them.

    Raises:
        LoadError: no such model.
    """
    if is_gguf(name):
        return None
    return load_config(name, trust_remote_code=trust_remote_code)


def require_readable(
    name: str, lengths: Iterable[int | None], *, trust_remote_code: bool = False
) -> None:
    """Refuse sequences longer than a model reads before it is loaded; None stands for no wish.

    Raises:
        CalibrationError: says how long they may be.
        LoadError: no such model.
    """
    wanted = [length for length in lengths if length is not None]
    config = config_of(name, trust_remote_code=trust_remote_code) if wanted else None
    if config is not None:
        for length in wanted:
            sequence_length(config, length=length)
