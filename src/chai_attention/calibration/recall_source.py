"""Calibration sequences with facts to recall, made from the other calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.recall import RecallSequences, recall_sequences
from chai_attention.calibration.settings import DEFAULT_RECALL, MOST_RECALL, Resolved
from chai_attention.errors import CalibrationError

RECALL = "recall"  # its name among sources of text
RECALL_SHARE = 0.25  # sequences of it for one of the other text, whatever its weight


def split_recall(items: Sequence[str]) -> tuple[list[str], float | None]:
    """Take ``recall`` or ``recall:weight`` out of the sources named on a command line.

    Its weight is relative to that of all other text; 0 leaves it out.

    Returns:
        the other items, and the weight; None if it is not among them.

    Raises:
        CalibrationError: there is no other text, it is named twice, or a weight that is none.
    """
    ours = [item for item in items if item.partition(":")[0] == RECALL]
    others = [item for item in items if item.partition(":")[0] != RECALL]
    if not ours:
        return others, None
    if not others:
        raise CalibrationError(
            f"{RECALL} hides facts in other text: name that too, such as --text sample.txt --text "
            f"{RECALL}"
        )
    if len(ours) > 1:
        raise CalibrationError(f"{RECALL} is there twice: give it once, with a larger weight")
    _, colon, number = ours[0].partition(":")
    if not colon:
        return others, DEFAULT_RECALL
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= MOST_RECALL:
        raise CalibrationError(
            f"{ours[0]}: the weight of {RECALL} is a number of at least 0, relative to all other "
            "text"
        )
    return others, weight


def recall_count(sequences: int) -> int:
    """How many sequences to recall from there are beside so many of the other text."""
    return max(1, round(RECALL_SHARE * sequences))


def recall_of(
    tokenizer: PreTrainedTokenizerBase | None, sequences: Tensor, seed: int
) -> RecallSequences:
    """Make sequences to recall from, one for four of ``sequences [N, S]``.

    They are spread over the text, and of its length.

    Raises:
        CalibrationError: sequences too short for a fact, no tokenizer, or one that cannot write it.
    """
    if tokenizer is None:
        raise CalibrationError("text to recall from needs the model's tokenizer")
    total = len(sequences)
    count = recall_count(total)
    rows = sequences[torch.arange(count) * total // count]
    return recall_sequences(tokenizer, rows, count, sequences.shape[1], seed=seed)


def use_recall(
    store: EvidenceStore,
    tokenizer: PreTrainedTokenizerBase | None,
    chosen: Resolved,
    *,
    required: bool,
) -> dict[str, Any]:
    """Give the store text to recall from, if it counts; return what the profile remembers of it.

    Text that has no room for facts is left without, unless they are required.
    """
    if not chosen.recall:
        return {}
    try:
        sequences = recall_of(tokenizer, store.sequences, chosen.seed)
    except CalibrationError as error:
        if required:
            raise
        store.use_recall(None)
        return {"recall": f"left out: {error}"}
    store.use_recall(sequences)
    return {"recall": chosen.recall, "recall_samples": len(sequences.tokens)}
