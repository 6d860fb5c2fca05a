"""The numbered steps of a calibration, for its progress."""

from __future__ import annotations

from chai_attention.calibration.budget import most_tries
from chai_attention.calibration.settings import Resolved
from chai_attention.progress import Progress, Report
from chai_attention.ranks import distinct_ranks
from chai_attention.runtime.shape import ModelShape


class Steps:
    """Numbers what is going on: ``step 2 of 5: gradient costs``.

    Args:
        progress: called with every step.
        total: steps in all.
        at_most: whether a search may end before them.
    """

    def __init__(self, progress: Progress, total: int, at_most: bool = False):
        self._progress = progress
        self._total = f"{'at most ' if at_most else ''}{total}"
        self._number = 0

    def begin(self, what: str) -> Report:
        """Begin the next step; return what is called with (done, in all) of it."""
        self._number += 1
        return self.go_on(what)

    def go_on(self, what: str) -> Report:
        """Return what reports another part of the same step."""
        label = f"step {self._number} of {self._total}: {what}"

        def report(done: int, total: int) -> None:
            self._progress(label, done, total)

        return report


def steps_of(passes: int, chosen: Resolved, shape: ModelShape) -> tuple[int, bool]:
    """Steps of a calibration with so many passes, and whether a search may end before them."""
    if chosen.max_loss is None:
        return passes + (2 if chosen.measures else int(chosen.refits)), False
    free = sum(shape.clusterable)
    if chosen.streams:
        # of one rank: all save the same
        held = 2 * shape.kv_heads // distinct_ranks(shape.kv_heads, chosen.tensor_parallel)
        units, most = held * shape.layers, held * free
        # the guess is known with the costs only: the worst of all
        tries = max(
            most_tries(most, 1 << n, max(1, units // 100)) for n in range(most.bit_length())
        )
    else:
        counts = chosen.layer_counts(shape)
        tries = most_tries(free * (len(counts) - 1), shape.layers * len(counts) // 20)
    return passes + 1 + tries, True
