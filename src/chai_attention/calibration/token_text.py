"""Documents as tokens, from which sequences of any length are cut."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chai_attention.calibration.drawing import Run
from chai_attention.calibration.text_files import pieces_of
from chai_attention.errors import CalibrationError

PIECE = 1 << 20  # characters that are turned into tokens at a time: a hundred bytes for each, of
# which a third is not given back. After FEW pieces they are smaller by a factor of SMALLER
FEW, SMALLER = 4, 8


class TokenText:
    """Tokens of documents, in four bytes each.

    Documents are joined, separated by the end-of-sequence token, and cut without overlap. A `Run`
    that is long enough is cut by itself, since what followed it in its text is not there; what is
    left at its end is in no sequence. Shorter ones are joined like documents.

    Args:
        texts: documents and runs.
        tokenizer: turns text into tokens.
        before: tokens that every sequence begins with.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        before: Sequence[int] = (),
    ):
        self._before = list(before)
        self._end = tokenizer.eos_token_id
        self._tokens = array("i")
        self._spans: list[tuple[int, int, bool]] = []  # first, end, whether it is one run
        self._characters = 0
        for text in texts:
            if text.strip():
                self._add(text, tokenizer)

    def __len__(self) -> int:
        """Tokens in all."""
        return len(self._tokens)

    def _add(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens, run = self._tokens, isinstance(text, Run)
        joins = bool(self._spans) and not run and not self._spans[-1][2]
        if joins and self._end is not None and tokens[-1] != self._end:
            tokens.append(self._end)
        start = len(tokens)
        self._characters += len(text)
        size = PIECE if self._characters <= FEW * PIECE else max(1, PIECE // SMALLER)
        for piece in pieces_of(text, size):
            # a whole text may be longer than the model's context: sequences are cut from it
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            tokens.extend(ids)
        before = self._before
        if before and tokens[start : start + len(before)].tolist() == before:
            del tokens[start : start + len(before)]  # a chat template writes it out
        if joins:
            start = self._spans.pop()[0]
        if len(tokens) > start:
            self._spans.append((start, len(tokens), run))

    def sequences(self, samples: int, length: int, seed: int) -> Tensor:
        """Return ``[N, length]`` int64, N at most ``samples``, in the order of the text.

        If there are more, the seed decides which are taken.

        Raises:
            CalibrationError: not enough text for one.
        """
        room = length - len(self._before)
        parts = self._cut(room) if room > 0 else []
        count = sum(map(len, parts))
        if not count:
            raise CalibrationError(
                f"calibration needs at least {max(room, 1)} tokens of text (--length), "
                f"this text has {len(self)}"
            )
        chosen = drawn(count, samples, seed)
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        shares = chosen.tensor_split(torch.searchsorted(chosen, ends)[:-1])
        starts = [0, *ends.tolist()[:-1]]
        rows = [part[at - start] for part, at, start in zip(parts, shares, starts, strict=True)]
        sequences = torch.cat(rows).long()
        return torch.cat(
            [torch.tensor(self._before).long().expand(len(sequences), -1), sequences], 1
        )

    def _cut(self, room: int) -> list[Tensor]:
        """All sequences, as ``[N, room]`` each, without what they begin with."""
        if not self._tokens:
            return []
        tokens = torch.frombuffer(self._tokens, dtype=torch.int32)
        end = tokens.new_tensor([] if self._end is None else [self._end])
        parts, rest = [], tokens[:0]  # of documents that are joined
        for first, last, run in self._spans:
            span = tokens[first:last]
            alone = run and len(span) >= room
            if not alone and len(rest):
                span = torch.cat([rest, span[:0] if rest[-1] == self._end else end, span])
            whole = len(span) // room * room
            parts.append(span[:whole].view(-1, room))
            if not alone:
                rest = span[whole:]
        return parts


def drawn(total: int, most: int, seed: int) -> Tensor:
    """Numbers below ``total``, ascending: all, or ``most`` of them that the seed decides."""
    if total <= most:
        return torch.arange(total)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:most].sort().values
