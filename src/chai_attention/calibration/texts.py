"""Sample text for calibration: files, data sets of the hub, or what the model writes itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.errors import CalibrationError
from chai_attention.hub import require_dataset

SELF = "self"
SELF_LENGTH = 256
SELF_TEMPERATURE = 0.9
HUB_DOCUMENTS = 20_000  # at most this many are streamed, enough for any default calibration
FILE_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".raw", ".gz", ".parquet")
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs on average; bounds what is read


def load_texts(source: str, *, tokens: int) -> list[str]:
    """Read documents from a text file, a ``.jsonl`` file or a data set of the hub.

    Args:
        source: path of a text file (one document) or of a ``.jsonl`` file (one object per line,
            its "text" field or else its longest string), or ``name`` / ``name:config`` of a hub
            data set, whose training split is streamed.
        tokens: roughly how many tokens are needed; a data set is read until they are there.

    Raises:
        CalibrationError: no such file or data set, or nothing in it.
    """
    path = Path(source)
    if path.is_file():
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"cannot read {source} as text: {error}") from error
        texts = _json_lines(content, source) if path.suffix == ".jsonl" else [content]
    elif path.is_dir():
        raise CalibrationError(f"{source} is a folder: give a text file or a .jsonl in it")
    elif path.suffix in FILE_SUFFIXES or source.startswith((".", "/", "~")):
        raise CalibrationError(f"no such text file: {source}")
    else:
        texts = _hub_texts(source, tokens)
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"{source} holds no text")
    return texts


def windows_of(
    texts: str | Sequence[str] | Tensor,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
) -> Tensor:
    """Cut text into windows of tokens and choose some of them: ``[N, length]`` int64.

    Documents are joined, separated by the end-of-sequence token, and cut without overlap. If the
    text has more than ``samples`` windows, the seed decides which are taken; fewer are all used.

    Args:
        texts: documents, or ready windows ``[N, S]`` with S of at least ``length``.
        tokenizer: turns text into tokens; no special tokens are added.
        samples: windows wanted.
        length: tokens per window.
        seed: of the choice.

    Raises:
        CalibrationError: less text than one window, or no windows wanted.
    """
    if samples < 1:
        raise CalibrationError(f"calibration needs at least 1 sample, not {samples}")
    if isinstance(texts, Tensor):
        if (
            texts.ndim != 2
            or texts.shape[1] < length
            or not len(texts)
            or texts.dtype != torch.long
        ):
            raise CalibrationError(f"windows must be a [N, {length}] int64 tensor of token ids")
        windows = texts[:, :length]
    else:
        tokens = _tokens([texts] if isinstance(texts, str) else texts, tokenizer)
        if len(tokens) < length:
            raise CalibrationError(
                f"calibration needs at least {length} tokens of text (--length), "
                f"this text has {len(tokens)}"
            )
        windows = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    if len(windows) > samples:
        generator = torch.Generator().manual_seed(seed)
        windows = windows[torch.randperm(len(windows), generator=generator)[:samples].sort().values]
    return windows


@torch.no_grad()
def self_text(
    model: PreTrainedModel,
    samples: int,
    length: int = SELF_LENGTH,
    *,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Let the model write its own calibration text: ``[samples, length]`` token ids.

    Sampled at temperature 0.9 from the beginning-of-sequence token (the end-of-sequence token if
    there is none), without stopping at ends of text. The same seed gives the same text; the
    global random state is left as it was. ``progress`` is called with (windows written, in all).

    Raises:
        CalibrationError: the model has neither of the two tokens, or no samples are wanted.
    """
    if samples < 1:
        raise CalibrationError(f"calibration needs at least 1 sample, not {samples}")
    config = model.generation_config
    start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if isinstance(start, list):
        start = start[0]
    if start is None:
        raise CalibrationError("this model has no token to begin with: give --text a file")
    generate: Any = model.generate
    devices = [model.device] if model.device.type == "cuda" else []
    windows = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for first in range(0, samples, batch_size):
            rows = min(batch_size, samples - first)
            prompt = torch.full((rows, 1), start, device=model.device)
            windows.append(
                generate(
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
            if progress is not None:
                progress(first + rows, samples)
    return torch.cat(windows)


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All documents as one list of tokens."""
    tokens: list[int] = []
    for text in texts:
        if not text.strip():
            continue
        if tokens and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        # a whole text may be longer than the model's context: windows are cut from it
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def _json_lines(content: str, source: str) -> list[str]:
    """The text of every object of a ``.jsonl`` file."""
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{source}, line {number} is not JSON: {error}") from error
        texts.append(_text_of(item, f"{source}, line {number}"))
    return texts


def _text_of(item: Any, where: str) -> str:
    """The field "text" of a record, or else its longest string."""
    strings = [v for v in item.values() if isinstance(v, str)] if isinstance(item, dict) else []
    if not strings:
        raise CalibrationError(f"{where} has no text field")
    text = item.get("text")
    return text if isinstance(text, str) else max(strings, key=len)


def _hub_texts(source: str, tokens: int) -> list[str]:
    """Stream documents of a hub data set until there are enough."""
    require_dataset(source, CalibrationError)
    import datasets

    name, _, config = source.partition(":")
    texts: list[str] = []
    characters = 0
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for item in stream:
            texts.append(_text_of(item, f"data set {source}"))
            characters += len(texts[-1])
            if characters > CHARACTERS_PER_TOKEN * tokens or len(texts) >= HUB_DOCUMENTS:
                break
    except CalibrationError:
        raise
    except Exception as error:  # the library raises a different type for every way to fail
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"{source} is neither a file nor a data set that can be streamed from the hub: {reason}"
        ) from error
    return texts
