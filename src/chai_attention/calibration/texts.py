"""Sample text for calibration: files, data sets of the hub, or text that the model generates."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.checks import not_finite, require_finite, require_tokens
from chai_attention.calibration.drawing import Drawing, Piece
from chai_attention.calibration.records import Chat, Records
from chai_attention.calibration.sizes import check_numbers
from chai_attention.calibration.template import TemplateError, chat_text
from chai_attention.calibration.text_files import (
    Record,
    is_plain,
    local_file,
    pieces_of,
    plain_pieces,
    reason_of,
    records_of,
)
from chai_attention.calibration.token_text import TokenText, drawn
from chai_attention.errors import CalibrationError, ChaiWarning
from chai_attention.hub import require_dataset
from chai_attention.integrations.transformers.devices import input_device
from chai_attention.integrations.transformers.logits import rows_at_once
from chai_attention.integrations.transformers.modes import evaluating
from chai_attention.progress import Report, silent

SELF = "self"
SELF_LENGTH = 256
SELF_TEMPERATURE = 0.9
HUB_DOCUMENTS = 20_000  # at most this many are streamed, enough for any default calibration
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs on average; bounds what is kept
LEAST_READ = 1 << 22  # characters of a file that are kept at least, if it has them
RUNS = 64  # parts that are drawn of a long text, as long as each holds some sequences
CHARACTERS_PER_RUN = 2 * CHARACTERS_PER_TOKEN  # per token: most often three or four sequences
MOST_NAME = 1024  # characters of a text that may be a file's name by mistake


def load_texts(
    source: str,
    *,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 1,
    seed: int = 0,
) -> list[str]:
    """Read documents from a file or a data set of the hub.

    A file is read to its end, and a bounded part of it is in memory. Of one with far more text
    than is needed, parts are drawn over the whole of it: documents, and of long ones `Run` objects,
    from which `windows_of` cuts sequences by themselves. A `ChaiWarning` says so. A data set is
    read until there is enough.

    Args:
        source: path of a text file (one document); of a ``.jsonl``, ``.json``, ``.csv``, ``.tsv``
            or ``.parquet`` of records (see `Records`); or ``name`` / ``name:config`` of a hub data
            set, whose training split is streamed.
        tokens: roughly how many tokens are needed.
        tokenizer: its chat template writes out chats. Those that it refuses are left out, which a
            `ChaiWarning` says.
        length: tokens of the longest sequences that are to be cut; runs hold some of them.
        seed: which parts.

    Raises:
        CalibrationError: no such file or data set, nothing in it, or chats that no template can
            write.
    """
    texts, refused = [], []
    for content in _contents(source, CHARACTERS_PER_TOKEN * tokens, length, seed):
        if isinstance(content, str):
            texts.append(content)
            continue
        try:
            texts.append(chat_text(tokenizer, content))
        except TemplateError as error:
            refused.append(error)
    if len(refused) > len(texts):
        raise refused[0]
    if refused:
        warnings.warn(
            f"{len(refused)} of {len(refused) + len(texts)} chats of {source} are left out: "
            f"{refused[0]}",
            ChaiWarning,
            stacklevel=2,
        )
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"{source} holds no text")
    return texts


def check_source(source: str) -> None:
    """Read the beginning of a file of text, before anything that takes time is done.

    Raises:
        CalibrationError: as `load_texts`. Of a data set of the hub only whether there is one.
    """
    if source == SELF:
        return
    path = local_file(source)
    if path is None:
        require_dataset(source, CalibrationError)
        return
    characters, found = 0, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it is read
        for piece in _pieces(source, path, LEAST_READ):
            characters += len(piece.content)
            found |= isinstance(piece.content, Chat) or bool(piece.content.strip())
            if characters > LEAST_READ:
                break
    if not found:
        raise CalibrationError(f"{source} holds no text")


def _contents(source: str, most: int, length: int, seed: int) -> Iterator[str | Chat]:
    """Texts and chats of a source: so many characters, of a file at least `LEAST_READ`."""
    path = local_file(source)
    if path is None:
        yield from _of_hub(source, most)
        return
    most = max(most, LEAST_READ)
    drawing = Drawing(most, seed)
    for piece in _pieces(source, path, max(most // RUNS, CHARACTERS_PER_RUN * length)):
        drawing.add(piece)
    if drawing.kept < drawing.seen:
        warnings.warn(
            f"{source} holds more text than this needs: {drawing.kept:,} of its {drawing.seen:,} "
            "characters are taken, drawn over the whole of it",
            ChaiWarning,
            stacklevel=3,
        )
    yield from drawing.contents()


def _pieces(source: str, path: Path, size: int) -> Iterator[Piece]:
    """A file's documents in pieces of at most ``size`` characters; chats are whole."""
    if is_plain(path):
        yield from _numbered(0, plain_pieces(path, size))
        return
    reader = Records(source)
    for number, (where, record) in enumerate(records_of(path)):
        content = reader.content(record, where)
        if isinstance(content, Chat):
            yield Piece(number, 0, True, content)
        elif content is not None:
            yield from _numbered(number, pieces_of(content, size))


def _numbered(document: int, texts: Iterator[str]) -> Iterator[Piece]:
    """Pieces of a document, the last of which is known when nothing follows."""
    held, part = next(texts, None), 0
    while held is not None:
        following = next(texts, None)
        yield Piece(document, part, following is None, held)
        held, part = following, part + 1


def _of_hub(source: str, most: int) -> Iterator[str | Chat]:
    """What a data set of the hub begins with."""
    reader, characters = Records(source), 0
    for where, record in _hub_records(source):
        if characters > most:
            return
        content = reader.content(record, where)
        if content is not None:
            yield content
            characters += len(content)


def windows_of(
    texts: str | Sequence[str] | Tensor | TokenText,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
) -> Tensor:
    """Cut text into sequences of tokens and choose some of them: ``[N, length]`` int64.

    Documents are joined, separated by the end-of-sequence token, and cut without overlap; parts of
    long ones that `load_texts` has drawn are cut by themselves. Every sequence begins with what the
    tokenizer puts before a text, such as a beginning-of-sequence token: there are models that
    cannot read without. If the text has more than ``samples`` sequences, the seed decides which are
    taken; fewer are all used.

    Args:
        texts: documents, their tokens from `as_tokens`, or ready sequences ``[N, S]`` with S of at
            least ``length``.
        tokenizer: turns text into tokens.
        samples: sequences wanted.
        length: tokens per sequence.
        seed: of the choice.

    Raises:
        CalibrationError: less text than one sequence, no sequences wanted, or an impossible seed.
    """
    check_numbers(samples, seed)
    if not isinstance(texts, Tensor):
        found = texts if isinstance(texts, TokenText) else as_tokens(texts, tokenizer)
        return found.sequences(samples, length, seed)
    if texts.ndim != 2 or texts.shape[1] < length or not len(texts) or texts.dtype != torch.long:
        raise CalibrationError(f"sequences must be a [N, {length}] int64 tensor of token ids")
    return texts[drawn(len(texts), samples, seed), :length]


def as_tokens(texts: str | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TokenText:
    """Turn documents into tokens once, for `windows_of` of several lengths.

    Raises:
        CalibrationError: what is no text.
    """
    return TokenText(_documents(texts), tokenizer, beginning(tokenizer))


def _documents(texts: str | Iterable[str]) -> list[str]:
    """Documents as a list; an error for what people pass instead."""
    if isinstance(texts, str):
        if len(texts) < MOST_NAME and os.path.isfile(texts):
            raise CalibrationError(
                f"{texts} is the name of a file, not text: load_texts() of "
                "chai_attention.calibration reads it"
            )
        return [texts]
    listed = isinstance(texts, Iterable) and not isinstance(texts, Mapping)
    found: list[Any] = list(texts) if listed else [None]
    if not all(isinstance(text, str) for text in found):
        raise CalibrationError(
            "text is a string, a list of strings or ready sequences; load_texts() of "
            "chai_attention.calibration reads a file"
        )
    return found


def cut_sequences(sequences: Tensor, length: int, before: Sequence[int] = ()) -> Tensor:
    """Cut sequences ``[N, S]`` to ``[M, length]``, each beginning with the tokens ``before``.

    Raises:
        CalibrationError: sequences that do not begin with them, or no room behind them.
    """
    if sequences.shape[1] == length or not before:
        return sequences.unfold(1, length, length).reshape(-1, length)
    start, room = torch.tensor(before), length - len(before)
    if room < 2 or not (sequences[:, : len(before)] == start).all():
        raise CalibrationError(
            f"sequences of {length} tokens cannot begin with the {len(before)} tokens that every "
            "text begins with"
        )
    rest = sequences[:, len(before) :].unfold(1, room, room).reshape(-1, room)
    return torch.cat([start.expand(len(rest), -1), rest], dim=1)


@torch.no_grad()
def self_text(
    model: PreTrainedModel,
    samples: int,
    length: int = SELF_LENGTH,
    *,
    seed: int = 0,
    batch_size: int = 32,
    progress: Report = silent,
) -> Tensor:
    """Let the model write its own calibration text: ``[samples, length]`` token ids.

    Sampled at temperature 0.9 from the beginning-of-sequence token (the end-of-sequence token if
    there is none), without stopping at ends of text, in eval mode. The same seed gives the same
    text; the global random state is left as it was. ``progress`` is called with (sequences written,
    in all).

    Raises:
        CalibrationError: the model has neither of the two tokens, no samples are wanted, or its
            probabilities are no numbers.
    """
    check_numbers(samples, seed)
    config = model.generation_config
    start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if isinstance(start, list):
        start = start[0]
    if start is None:
        raise CalibrationError("this model has no token to begin with: give --text a file")
    begin = torch.full((1, 2), start)
    require_tokens(model, begin)
    require_finite(model, begin)  # sampling from NaN would end a process that uses a GPU
    device = input_device(model)
    devices = [device] if device.type == "cuda" else []
    sequences = []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        torch.manual_seed(seed)
        most = rows_at_once(batch_size, length)  # the cache of long texts is large
        for first in range(0, samples, most):
            rows = min(most, samples - first)
            prompt = torch.full((rows, 1), start, device=device)
            sequences.append(
                _written(
                    model,
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=length - 1,
                    min_new_tokens=length - 1,
                    do_sample=True,
                    temperature=SELF_TEMPERATURE,
                    top_k=0,
                    top_p=1.0,
                    pad_token_id=start,
                ).cpu()
            )
            progress(first + rows, samples)
    return torch.cat(sequences)


def _written(model: PreTrainedModel, prompt: Tensor, **options: Any) -> Tensor:
    generate: Any = model.generate
    try:
        written: Tensor = generate(prompt, **options)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise not_finite(model, "a probability of this model") from error
    return written


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return list(whole[:start])
    return []


def _hub_records(source: str) -> Iterator[Record]:
    """Stream records of a hub data set."""
    require_dataset(source, CalibrationError)
    import datasets

    name, _, config = source.partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, item in enumerate(islice(stream, HUB_DOCUMENTS), start=1):
            yield f"data set {source}, record {number}", item
    except Exception as error:  # the library raises a different type for every way to fail
        raise CalibrationError(
            f"{source} is neither a file nor a data set that can be streamed from the hub: "
            f"{reason_of(error)}"
        ) from error
