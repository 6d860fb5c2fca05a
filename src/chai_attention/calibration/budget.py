"""Search for the largest saving whose measured loss keeps a promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from chai_attention.calibration.perplexity import PairedRise

CONFIDENCE = 1.645  # standard errors: the promise holds with 95% confidence, one-sided


@dataclass(frozen=True)
class Kept:
    """What was found.

    Attributes:
        units: removed; 0 if not even one can be.
        rises: measured with them removed; those of one unit if none can be.
        tried: profiles measured.
    """

    units: int
    rises: Sequence[PairedRise]
    tried: int


def largest_within(
    measure: Callable[[int], Sequence[PairedRise]],
    most: int,
    max_loss: float,
    guess: int,
    resolution: int = 1,
    also: Callable[[int], bool] = lambda units: True,
) -> Kept:
    """Search the most units whose removal raises perplexity by at most ``max_loss``.

    A rise counts with `CONFIDENCE` standard errors on top. From the guess the step doubles or
    halves until the answer is enclosed, then the middle is tried. Losses need not rise with every
    unit: what is returned was measured itself.

    Args:
        measure: returns the rises, all of which have to keep to the loss, without so many units.
        most: units that can be removed.
        max_loss: relative rise of perplexity.
        guess: units to begin with.
        resolution: units that the answer may fall short by.
        also: asked of units whose rises keep to the loss, once each: whether all else that is
            promised holds, too.
    """
    kept: dict[int, bool] = {}
    measured: dict[int, Sequence[PairedRise]] = {}

    def holds(units: int) -> bool:
        if units not in kept:
            measured[units] = measure(units)
            kept[units] = all(
                rise.rise + CONFIDENCE * rise.standard_error <= max_loss for rise in measured[units]
            ) and also(units)
        return kept[units]

    # removing low keeps the promise, removing high does not
    low, high, units = 0, most + 1, min(max(guess, 1), most)
    while high - low > (resolution if low else 1):
        low, high, units = _next(low, high, units, most, holds(units))
    return Kept(low, measured[low or 1], len(measured))


def _next(low: int, high: int, units: int, most: int, holds: bool) -> tuple[int, int, int]:
    """What is known when units hold, or do not, and which are tried next."""
    if holds:
        return units, high, min(2 * units, most) if high > most else (units + high) // 2
    return low, units, (low + units) // 2 if low else max(1, units // 2)


def most_tries(most: int, guess: int, resolution: int = 1) -> int:
    """How many profiles `largest_within` measures at most."""

    @cache
    def tries(low: int, high: int, units: int) -> int:
        if high - low <= (resolution if low else 1):
            return 0
        return 1 + max(tries(*_next(low, high, units, most, holds)) for holds in (True, False))

    return tries(0, most + 1, min(max(guess, 1), most))
