"""Text with facts to recall: hidden in other text, and asked for at its end.

Perplexity hardly notices heads that look far back for one thing. Here only the answers' loss
counts. Everything is drawn at random by a seed; nothing has to be downloaded.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chai_attention.calibration.recall_words import CALIBRATION, EVALUATION, Phrasing, Wording
from chai_attention.calibration.template import rendered
from chai_attention.calibration.texts import beginning
from chai_attention.errors import CalibrationError
from chai_attention.results import digest

MOST_FACTS = 8  # in a sequence of calibration text
MOST_SHARE = 0.5  # of a sequence, that is not the other text
# parts of a rendered chat, which no template changes
_MARKS = ("first7question", "first7answer", "second7question")


@dataclass(frozen=True)
class RecallSequences:
    """Sequences of calibration text.

    Attributes:
        tokens: ``[N, S]`` int64.
        counted: ``[N, S]`` bool, True for the tokens of answers: the only ones whose loss counts.
    """

    tokens: Tensor
    counted: Tensor


@dataclass(frozen=True)
class RecallCase:
    """One question about a text.

    Attributes:
        prompt: ``[P]`` int64, up to the opening of the answer.
        answer: ``[A]`` int64.
    """

    prompt: Tensor
    answer: Tensor

    @property
    def digest(self) -> str:
        """Of prompt and answer."""
        tokens = torch.cat([torch.tensor([len(self.prompt)]), self.prompt, self.answer])
        return digest(tokens)


def recall_sequences(
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    samples: int,
    length: int,
    *,
    seed: int = 0,
) -> RecallSequences:
    """Hide facts in sequences and ask for all of them at the end, with their answers.

    Text and questions are put into the tokenizer's chat template, if it has one.

    Args:
        tokenizer: of the model.
        text: ``[M, T]`` tokens of other text, T of at least ``length``; sequence i uses a piece of
            row i modulo M.
        samples: N sequences.
        length: S tokens per sequence.
        seed: of everything that is drawn. A sequence depends on its number, not on ``samples``.

    Raises:
        CalibrationError: sequences too short for a fact and its question, too little text, or a
            chat template that cannot be used.
    """
    _check(text, samples, length)
    writer = _Writer(tokenizer, CALIBRATION)
    tokens = torch.empty(samples, length, dtype=torch.long)
    counted = torch.zeros(samples, length, dtype=torch.bool)
    for number in range(samples):
        draw = random.Random(f"recall window {seed} {number}")
        facts = draw.randint(2, MOST_FACTS)
        row = text[number % len(text)].tolist()
        written = writer.write(draw, row, length, facts, facts, fewer=True)
        tokens[number] = torch.tensor([token for token, _ in written])
        counted[number] = torch.tensor([answer for _, answer in written])
    return RecallSequences(tokens, counted)


def recall_cases(
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    cases: int,
    length: int,
    *,
    facts: int = 1,
    seed: int = 0,
    wording: Wording = EVALUATION,
) -> list[RecallCase]:
    """Make questions of evaluation: ``facts`` hidden in a text, one of them asked for.

    Prompt and answer have ``length`` tokens together, in words of ``wording``. Other arguments and
    errors as `recall_sequences`.
    """
    _check(text, cases, length)
    if not 1 <= facts <= len(wording.names):
        raise CalibrationError(f"a text can hide 1 to {len(wording.names)} facts, not {facts}")
    writer = _Writer(tokenizer, wording)
    found = []
    for number in range(cases):
        draw = random.Random(f"recall case {seed} {number}")
        row = text[number % len(text)].tolist()
        written = writer.write(draw, row, length, facts, 1, fewer=False)
        prompt = [token for token, answer in written if not answer]
        answer = [token for token, _ in written[len(prompt) :]]
        found.append(RecallCase(torch.tensor(prompt), torch.tensor(answer)))
    return found


_Written = list[tuple[int, bool]]  # tokens, and whether they are an answer's


class _Writer:
    """Puts sequences together, token by token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, wording: Wording):
        self._tokenizer = tokenizer
        self._wording = wording
        chat = bool(tokenizer.chat_template)
        # before the first message, from a question to its answer, on to the next question
        frame = _chat_frame(tokenizer) if chat else ("", "\n", "\n\n")
        self._begins = beginning(tokenizer)  # there are models that cannot read without
        self._begin = [] if chat else self._begins  # a chat template writes it out
        self._head, self._to_answer, self._to_question = frame

    def write(
        self,
        draw: random.Random,
        text: list[int],
        length: int,
        facts: int,
        asked: int,
        *,
        fewer: bool,
    ) -> _Written:
        """Write ``length`` tokens, of which the last ones are an answer.

        With ``fewer``, there may be fewer facts if the sequence is too short for as many.
        """
        wording = self._wording
        if text[: len(self._begins)] == self._begins:
            text = text[len(self._begins) :]
        phrasing = draw.choice(wording.phrasings)
        names = draw.sample(wording.names, facts)
        values = self._values(draw, facts)
        places = [draw.random() for _ in names]
        start = draw.random()
        order = draw.sample(range(facts), facts)
        while True:
            told = [
                self._tokens(f" {phrasing.fact.format(name=name, value=value)} ")
                for name, value in zip(names, values, strict=True)
            ]
            before = self._begin + self._tokens(f"{self._head}{wording.instruction}\n\n")
            after: _Written = []
            for fact in [fact for fact in order if fact < len(names)][:asked]:
                lead = self._to_question if after else "\n\n"
                after += self._question(lead, phrasing, names[fact], values[fact])
            size = len(before) + sum(map(len, told)) + len(after)
            if size <= MOST_SHARE * length:
                break
            if not fewer or len(names) == 1:
                raise CalibrationError(
                    f"{length} tokens are too few for text with {len(names)} fact"
                    f"{'s' * (len(names) > 1)} to recall, which needs {int(size / MOST_SHARE)}: "
                    "take a larger length"
                )
            names, values, places = names[:-1], values[:-1], places[:-1]
        room = length - size
        first = int(start * (len(text) - room + 1))
        rest = text[first : first + room]
        tokens, done = before, 0
        for place, fact_tokens in sorted(zip(places, told, strict=True)):
            at = int(place * (room + 1))
            tokens = [*tokens, *rest[done:at], *fact_tokens]
            done = at
        return [(token, False) for token in [*tokens, *rest[done:]]] + after

    def _question(self, lead: str, phrasing: Phrasing, name: str, value: str) -> _Written:
        """A question with the opening of its answer, and the answer."""
        question = phrasing.question.format(name=name)
        asked = f"{lead}{question}{self._to_answer}{phrasing.opening.format(name=name)}"
        bare, whole = self._tokens(asked), self._tokens(f"{asked} {value}")
        # the last token of the opening may be another one with the value behind it
        same = next(
            (i for i, pair in enumerate(zip(bare, whole, strict=False)) if pair[0] != pair[1]),
            min(len(bare), len(whole)),
        )
        return [(token, place >= same) for place, token in enumerate(whole)]

    def _values(self, draw: random.Random, count: int) -> list[str]:
        """Answers, all different."""
        found: dict[str, None] = {}
        while len(found) < count:
            pattern = draw.choice(self._wording.values)
            value = "".join(
                draw.choice(string.digits if sign == "0" else string.ascii_uppercase)
                if sign in "0A"
                else sign
                for sign in pattern
            )
            found[value] = None
        return list(found)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What a chat template puts before a question, from it to an answer, and on from there."""
    roles = ("user", "assistant", "user")
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    rest = str(rendered(tokenizer, chat, "render a chat of two questions", tokenize=False))
    frame = []
    for mark in _MARKS:
        before, found, rest = rest.partition(mark)
        if not found:
            raise CalibrationError(
                "the chat template of this tokenizer leaves out what is said in a chat of two "
                "questions"
            )
        frame.append(before)
    return frame[0], frame[1], frame[2]


def _check(text: Tensor, count: int, length: int) -> None:
    if count < 1:
        raise CalibrationError(f"at least 1 text to recall from is needed, not {count}")
    if text.ndim != 2 or text.dtype != torch.long or not len(text) or text.shape[1] < length:
        raise CalibrationError(
            f"text to recall from needs other text of at least {length} tokens in a row: "
            "[M, length] int64"
        )
