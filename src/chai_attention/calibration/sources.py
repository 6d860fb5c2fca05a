"""Calibration text mixed from several sources."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.atomic_write import same_contents
from chai_attention.calibration.checks import require_tokens
from chai_attention.calibration.data import apportion
from chai_attention.calibration.evidence_file import EvidenceFile
from chai_attention.calibration.perplexity import PairedRise
from chai_attention.calibration.recall_source import RECALL
from chai_attention.calibration.sizes import check_numbers
from chai_attention.calibration.text_files import FILE_SUFFIXES
from chai_attention.calibration.texts import (
    SELF,
    as_tokens,
    load_texts,
    self_text,
    windows_of,
)
from chai_attention.calibration.token_text import TokenText
from chai_attention.errors import CalibrationError, ChaiError, ChaiWarning
from chai_attention.progress import Progress, quiet

_WEIGHTED = re.compile(r"(?P<name>.+):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)")
MOST_WEIGHT = 1e9  # and its inverse the least: shares of them stay numbers
# rises of two sources count as different from this ratio, and this many standard errors on
UNEVEN_RATIO = 2.0
UNEVEN_ERRORS = 2.0


@dataclass(frozen=True)
class Source:
    """One source of calibration text.

    Attributes:
        name: a file, a data set of the hub (see `load_texts`), or "self": the model writes it.
        weight: its share of the sequences, relative to the weights of the other sources.
    """

    name: str
    weight: float = 1.0


def parse_sources(items: Sequence[str]) -> list[Source]:
    """Read sources as they are written on a command line: ``name`` or ``name:weight``.

    Only a number after the last colon is a weight, so that ``name:config`` names a data set of
    the hub; a config that is a number needs a weight after it (``name:103:1``). A file whose name
    is all of the item has no weight. Without weights all sources count the same.

    Raises:
        CalibrationError: no source, one named twice, a weight that is not positive, or weights
            for some sources only.
    """
    if not items:
        raise CalibrationError("calibration needs at least one source of text")
    sources, weighted = [], 0
    for item in items:
        if item.partition(":")[0] == RECALL:
            raise CalibrationError(
                f"{RECALL} is text that calibrations learn from beside other text: leave it out "
                "here"
            )
        match = None if _is_file(item) else _WEIGHTED.fullmatch(item)
        name, weight = (match["name"], float(match["weight"])) if match else (item, 1.0)
        file, _, rest = item.rpartition(":")
        local = _is_file(file) or Path(file).suffix.lower() in FILE_SUFFIXES
        if not match and file and local and not _is_file(item):  # not a name of the hub
            raise CalibrationError(
                f"{item}: {file} is a file, and its weight {rest!r} is not a positive number"
            )
        if not name.strip():
            raise CalibrationError("the name of a source of text is empty")
        if not 1 / MOST_WEIGHT <= weight <= MOST_WEIGHT:
            raise CalibrationError(
                f"{item}: the weight of a source is a positive number, at most {MOST_WEIGHT:,.0f}"
            )
        sources.append(Source(name, weight))
        weighted += match is not None
    if weighted not in (0, len(sources)):
        raise CalibrationError("give every source of text a weight (name:weight), or none")
    # the same text by two names would be held out and calibrated on
    for source, other in combinations(sources, 2):
        if source.name == other.name or same_contents(source.name, other.name):
            raise CalibrationError(
                f"{other.name} is there twice: give it once, with a larger weight"
            )
    return sources


def require_unseen(text: str, sources: Sequence[Source], error: type[ChaiError]) -> None:
    """Refuse text to measure on that is calibration text, by any name or as a copy.

    Raises:
        ChaiError: of the given type.
    """
    if any(same_contents(text, source.name) for source in sources):
        raise error(f"{text} is calibration text: measure on another")


def mixed_sequences(
    sources: Sequence[Source],
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    *,
    texts: Mapping[str, TokenText] | None = None,
    kept: EvidenceFile | None = None,
    progress: Progress = quiet,
) -> tuple[Tensor, Tensor]:
    """Take sequences from every source, in proportion to the weights.

    The shares are rounded by largest remainder. A source with too little text for its share is
    used whole; if there are others, which get no more for that, a `ChaiWarning` names it. The seed
    decides which sequences of a text are taken, what the model writes, and how the sources are
    interleaved; the sequences of one source stay in the order of its text.

    Args:
        sources: where the text comes from.
        model: writes the text of the source "self"; None if that is none of them.
        tokenizer: turns text into tokens.
        samples: sequences wanted in all.
        length: tokens per sequence.
        seed: of every choice.
        texts: what `read_sources` has read; None to read it now.
        kept: gives what the model wrote in an interrupted calibration back, and keeps it.
        progress: called with (what is going on, done, in all).

    Returns:
        sequences ``[N, length]`` int64 and the index of each one's source ``[N]`` int64.

    Raises:
        CalibrationError: fewer samples than give every source a sequence, a source that cannot be
            read, or one with less text than a sequence.
    """
    shares = _shares(sources, samples, seed)
    if texts is None:
        texts = read_sources(sources, tokenizer, samples, length, seed, progress=progress)
    parts = []
    for source, share in zip(sources, shares, strict=True):
        if source.name == SELF:
            assert model is not None
            part = _self_text(model, share, length, seed, kept, progress)
        else:
            try:
                part = windows_of(texts[source.name], tokenizer, share, length, seed)
            except CalibrationError as error:
                raise CalibrationError(f"{source.name}: {error}") from error
        if len(part) < share and len(sources) > 1:
            warnings.warn(
                f"{source.name} has text for {len(part)} of the {share} sequences of its share: "
                "all of it is used, and it weighs less than asked",
                ChaiWarning,
                stacklevel=2,
            )
        parts.append(part)
    labels = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts]))
    generator = torch.Generator().manual_seed(seed)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    sequences = torch.empty(len(labels), length, dtype=torch.long)
    for index, part in enumerate(parts):
        sequences[labels == index] = part
    if model is not None:
        require_tokens(model, sequences)
    return sequences, labels


def read_sources(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    *,
    longest: int | None = None,
    progress: Progress = quiet,
) -> dict[str, TokenText]:
    """Read the text of every source but the model, for sequences of any length up to a longest one.

    Args:
        sources: where the text comes from.
        tokenizer: turns it into tokens.
        samples: sequences wanted of all sources together.
        length: tokens of these sequences.
        seed: what is read of a file with far more text.
        longest: tokens of the longest sequences that may be cut; None for ``length``.
        progress: called with (what is going on, done, in all).

    Returns:
        tokens by the source's name.

    Raises:
        CalibrationError: as `mixed_sequences`, but for sources with little text.
    """
    found = {}
    for source, share in zip(sources, _shares(sources, samples, seed), strict=True):
        if source.name != SELF:
            progress(f"reading {source.name}", 0, 1)
            texts = load_texts(
                source.name, tokens=share * length, tokenizer=tokenizer, length=longest or length,
                seed=seed,
            )  # fmt: skip
            found[source.name] = as_tokens(texts, tokenizer)
    return found


def _shares(sources: Sequence[Source], samples: int, seed: int) -> list[int]:
    """Sequences of every source."""
    check_numbers(samples, seed)
    shares = apportion(samples, [source.weight for source in sources])
    starved = [source.name for source, share in zip(sources, shares, strict=True) if share < 1]
    if starved:
        raise CalibrationError(
            f"{samples} samples leave no sequence for {', '.join(starved)}: "
            "take more samples, or larger weights"
        )
    return shares


def _self_text(
    model: PreTrainedModel,
    samples: int,
    length: int,
    seed: int,
    kept: EvidenceFile | None,
    progress: Progress,
) -> Tensor:
    """What the model writes, unless it was written before."""
    written = torch.zeros(samples, length, dtype=torch.long)
    name = f"text of seed {seed}"
    if kept is not None and kept.restore(name, {"tokens": written}) == samples:
        return written
    written = self_text(
        model,
        samples,
        length,
        seed=seed,
        progress=lambda done, total: progress("the model writes text", done, total),
    )
    if kept is not None:
        kept.keep(name, {"tokens": written}, samples)
    return written


def warn_uneven(rises: Mapping[str, PairedRise]) -> str | None:
    """Say in a sentence that one source suffers far more than another; None if none does.

    Far more is more than twice the rise of perplexity, and more than two standard errors of the
    difference. Of several such pairs the one furthest apart is named.

    Args:
        rises: the rise of perplexity on held-out text of each source.
    """

    def gap(pair: tuple[str, str]) -> float:
        return rises[pair[0]].rise - rises[pair[1]].rise

    def uneven(pair: tuple[str, str]) -> bool:
        above, below = (rises[name] for name in pair)
        error = math.hypot(above.standard_error, below.standard_error)
        far = above.rise > UNEVEN_RATIO * max(below.rise, 0.0)
        return far and gap(pair) > UNEVEN_ERRORS * error

    worst = max(filter(uneven, permutations(rises, 2)), key=gap, default=None)
    if worst is None:
        return None
    high, low = worst
    return (
        f"perplexity rises by {rises[high].rise:.1%} on {high} but by {rises[low].rise:.1%} on "
        f"{low}: give {high} more weight, or save less"
    )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long a name, links in a circle
        return False
