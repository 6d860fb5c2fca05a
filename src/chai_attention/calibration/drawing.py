"""Random samples of a long text file, in bounded memory."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import groupby
from random import Random
from typing import NamedTuple

from chai_attention.calibration.records import Chat


class Run(str):
    """A part of a longer text, of which the rest is left out."""

    __slots__ = ()


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        document: its number in the file.
        part: its number in the document.
        last: whether it is the document's last.
        content: its text; a chat is in one piece.
    """

    document: int
    part: int
    last: bool
    content: str | Chat


class Drawing:
    """Draws pieces of text as they come, so that every one is kept with the same probability.

    Each gets a random number, and those with the smallest are kept: as many as there is room for.
    A piece that did not fit lowers the bound for all that come later. Nothing is left out while
    there is room for all.

    Args:
        most: characters that are kept.
        seed: of the random numbers; the same pieces and seed give the same choice.
    """

    def __init__(self, most: int, seed: int):
        self._most = most
        self._draw = Random(seed)
        self._bound = math.inf
        self._heap: list[tuple[float, Piece]] = []  # the largest number first
        self.kept = 0  # characters
        self.seen = 0  # characters

    def add(self, piece: Piece) -> None:
        """Keep a piece, or leave it out for good."""
        number, size = self._draw.random(), len(piece.content)
        self.seen += size
        if number >= self._bound:
            return
        heapq.heappush(self._heap, (-number, piece))
        self.kept += size
        while self.kept > self._most and len(self._heap) > 1:
            worst, gone = heapq.heappop(self._heap)
            self._bound = -worst
            self.kept -= len(gone.content)

    def contents(self) -> Iterator[str | Chat]:
        """Documents in the order of the file; what is left of those with a piece missing as runs.

        Pieces that follow each other are one run.
        """
        pieces = sorted(piece for _, piece in self._heap)
        # neighbours have the same difference of places
        for _, group in groupby(enumerate(pieces), lambda at: (at[1].document, at[1].part - at[0])):
            run = [piece for _, piece in group]
            if isinstance(run[0].content, Chat):
                yield run[0].content
                continue
            text = "".join(str(piece.content) for piece in run)
            yield text if run[0].part == 0 and run[-1].last else Run(text)
