"""Which step of how many a calibration is at."""

from __future__ import annotations

from collections.abc import Callable

from chai_attention.progress import Progress


class Steps:
    """Numbers what is going on: ``step 2 of 5: gradient costs``.

    Args:
        progress: who is told.
        total: steps in all.
        at_most: whether a search may end before them.
    """

    def __init__(self, progress: Progress, total: int, at_most: bool = False):
        self._progress = progress
        self._total = f"{'at most ' if at_most else ''}{total}"
        self._number = 0

    def begin(self, what: str) -> Callable[[int, int], None]:
        """Begin the next step; return what is called with (done, in all) of it."""
        self._number += 1
        return self.go_on(what)

    def go_on(self, what: str) -> Callable[[int, int], None]:
        """Return what reports another part of the same step."""
        label = f"step {self._number} of {self._total}: {what}"

        def report(done: int, total: int) -> None:
            self._progress(label, done, total)

        return report
