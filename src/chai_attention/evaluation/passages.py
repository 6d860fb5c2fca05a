"""LAMBADA-style items from any plain text: passages whose last word is to be predicted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from chai_attention.calibration.token_text import drawn

_PARAGRAPHS = re.compile(r"\n\s*\n")
_LAST = re.compile(r"(?P<word>[A-Za-z]{3,})[.!?][\"')\]]*")
_MARKS = "\"'()[].,;:!?"
LEAST, MOST = 30, 150  # words of a passage


def last_word_items(texts: Sequence[str], *, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Cut passages out of a text that end with a word which occurred in them before.

    A passage is the beginning of a paragraph (paragraphs are separated by blank lines), up to
    the first word from the thirtieth on that ends a sentence, has three or more letters and
    occurred earlier in the passage, as nearly all answers of LAMBADA do (Paperno et al. 2016,
    section 4): so the context says the answer, and a model that attends to it can know. The full
    stop goes, words are separated by single spaces. One paragraph yields at most one passage.

    Args:
        texts: documents.
        count: passages wanted; if the text has more, the seed decides which, in its order.
        seed: of the choice.

    Returns:
        At most ``count`` rows ``{"text": passage}``, the columns of LAMBADA's data sets.
    """
    items = []
    for text in texts:
        for paragraph in _PARAGRAPHS.split(text):
            words = paragraph.split()
            end = _end(words)
            if end is not None:
                index, word = end
                items.append({"text": " ".join([*words[:index], word])})
    return [items[index] for index in drawn(len(items), count, seed).tolist()]


def _end(words: Sequence[str]) -> tuple[int, str] | None:
    """Where a passage can end, and the word there without its full stop."""
    seen: set[str] = set()
    for index, word in enumerate(words[:MOST]):
        match = _LAST.fullmatch(word)
        if index + 1 >= LEAST and match and match["word"].lower() in seen:
            return index, match["word"]
        seen.add(word.strip(_MARKS).lower())
    return None
