"""The text of a calibration as tokens: what is learnt from, and what is held out to measure on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.settings import Resolved
from chai_attention.calibration.sizes import longest_text
from chai_attention.calibration.texts import cut_sequences
from chai_attention.errors import CalibrationError, ChaiWarning

STRETCHES = (4, 2)  # how much longer the sequences are on which a loss is measured once more
LEAST_SEQUENCES = 6  # to learn from and to measure on
LEAST_LONG = 2 * LEAST_SEQUENCES  # long ones, with fewer of which short ones are taken

# called with (sequences wanted, tokens of each); returns those that there are, [N, S] int64, and
# the index of the source of each, [N] int64: None if the text is of one source
Read = Callable[[int, int], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class CalibrationData:
    """Tokens that a calibration learns from, and others that it measures on.

    Attributes:
        sequences: ``[N, S]`` int64, to learn from.
        held_out: ``[M, S]`` int64, to measure on; None if nothing is measured.
        longer: ``[L, T]`` int64, to measure on, too; None for none.
        sources: ``[M]`` int64, the source of each of ``held_out``; None if all are of one.
    """

    sequences: Tensor
    held_out: Tensor | None = None
    longer: Tensor | None = None
    sources: Tensor | None = None

    @property
    def measured(self) -> list[Tensor]:
        """All sequences to measure on, the longest last."""
        return [tokens for tokens in (self.held_out, self.longer) if tokens is not None]


def stretches(model: PreTrainedModel, chosen: Resolved, length: int) -> list[int]:
    """How many times as long as ``length`` `read_data` tries to make sequences, longest first.

    Settings with streaming heads measure at two lengths.
    """
    longest = longest_text(model)
    return [
        times
        for times in (STRETCHES if chosen.streams else ())
        if longest is None or times * length <= longest
    ]


def read_data(
    read: Read,
    samples: int,
    held_out: int,
    length: int,
    times: Sequence[int] = (),
    before: Sequence[int] = (),
) -> CalibrationData:
    """Read text, and hold a part of it out.

    As many sequences are held out as asked, if there is text for them and for the samples. Else a
    third at most, which a `ChaiWarning` says.

    Args:
        read: gives sequences of any length.
        samples: sequences to learn from.
        held_out: sequences to measure on.
        length: tokens of each.
        times: how many times as long the sequences that are read may be, so that whole ones can be
            measured on: the first is taken of which the text has enough, else ``length`` itself.
        before: tokens that every sequence begins with.

    Raises:
        CalibrationError: too little text.
    """
    for factor in times:
        samples_read, held_read = -(-samples // factor), -(-held_out // factor)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                tokens, sources = read(samples_read + held_read, factor * length)
            except CalibrationError:
                continue
        if len(tokens) >= LEAST_LONG:
            for one in told:  # not what was said of sequences that are not taken
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            break
    else:
        factor, samples_read, held_read = 1, samples, held_out
        tokens, sources = read(samples + held_out, length)
    found = len(tokens)
    count = held_read if found >= samples_read + held_read else min(held_read, found // 3)
    if found < LEAST_SEQUENCES or count < 2:
        raise CalibrationError(
            f"measuring a loss needs at least {LEAST_SEQUENCES} sequences of text, 2 of them held "
            f"out; this is enough for {found}: give more text or a shorter length"
        )
    if found < samples_read + held_read:
        warnings.warn(
            f"the text has {found} sequences of {factor * length} tokens, not {samples_read} and "
            f"{held_read}: {found - count} are learnt from, and {count} measured on",
            ChaiWarning,
            stacklevel=3,
        )
    held = hold_out(found, count, sources)
    sources = None if sources is None else sources[held]
    if factor == 1:
        return CalibrationData(tokens[~held], tokens[held], None, sources)
    short = cut_sequences(tokens[held], length, before)
    if sources is not None:
        sources = sources.repeat_interleave(len(short) // count)
    return CalibrationData(
        cut_sequences(tokens[~held], length, before), short, tokens[held], sources
    )


def hold_out(total: int, count: int, sources: Tensor | None = None) -> Tensor:
    """Choose ``count`` of ``total`` sequences to hold out: ``[total]`` bool.

    They are evenly spread over the text, or over that of each of several sources, in the
    proportions of the whole: a text's end may be about something else than what is before it. No
    source is held out whole.

    Args:
        total: sequences.
        count: how many of them to hold out.
        sources: ``[total]`` int64, the source of each; those of one source are in the order of
            its text.

    Raises:
        CalibrationError: fewer than 0, or so many that a source would have nothing left.
    """
    held = torch.zeros(total, dtype=torch.bool)
    if sources is None:
        held[_spread(total, count)] = True
        return held
    counts = torch.bincount(sources).tolist()
    most = [max(0, size - 1) for size in counts]
    if not 0 <= count <= sum(most):
        raise CalibrationError(
            f"of {total} sequences from {len(counts)} sources, 0 to {sum(most)} can be held out, "
            f"not {count}: take more samples"
        )
    for index, share in enumerate(apportion(count, counts, most)):
        places = (sources == index).nonzero()[:, 0]
        held[places[_spread(len(places), share)]] = True
    return held


def _spread(total: int, count: int) -> list[int]:
    """``count`` numbers below ``total``, as far from each other as from the ends."""
    return [round((i + 0.5) * total / count - 0.5) for i in range(count)]


def apportion(total: int, weights: Sequence[float], most: Sequence[int] | None = None) -> list[int]:
    """Deal ``total`` out by largest remainder; ties go to the first, no share above ``most``."""
    limits = [total] * len(weights) if most is None else list(most)
    largest = max(weights)  # the sum of large weights is more than a float holds
    parts = [weight / largest for weight in weights] if largest else list(weights)
    # rounded, so that 0.1 + 0.2 does not decide a tie
    quotas = [round(total * part / sum(parts), 9) for part in parts]
    shares = [min(int(quota), limit) for quota, limit in zip(quotas, limits, strict=True)]
    while sum(shares) < total:
        open_ = [i for i, share in enumerate(shares) if share < limits[i]]
        best = max(open_, key=lambda i: quotas[i] - shares[i])
        shares[best] += 1
    return shares
