"""Timed generation: the text, its times and the memory of its cache."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from chai_attention.errors import ChaiError, ChaiWarning, first_line
from chai_attention.integrations.transformers.cache import CacheMemory, memory_of

LEAST_TEMPERATURE = 1e-6  # scores of 1e30 divided by it are still numbers of float32


class PromptError(ChaiError):
    """A prompt the model cannot go on from."""


@dataclass(frozen=True)
class Written:
    """What was generated, how fast, and what the K,V cache held at the end.

    Attributes:
        text: the new text.
        tokens: number of new tokens.
        ttft: time to first token, seconds.
        tpot: mean time per further token, seconds; None with a single token.
        memory: of the cache at the end; a full cache reports its own bytes as full bytes.
    """

    text: str
    tokens: int
    ttft: float
    tpot: float | None
    memory: CacheMemory


class _Clock(TextStreamer):
    """Streams text to a callback and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self.text = ""
        self._on_text = on_text
        self._prompt_came = False

    def put(self, value: Tensor) -> None:
        if self._prompt_came:
            self.times.append(time.perf_counter())
        self._prompt_came = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._on_text(text)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> Tensor:
    """Turn a prompt into token ids ``[1, S]``, through the chat template if asked.

    Raises:
        PromptError: an empty prompt, or a chat without a template that can render it.
    """
    if not prompt.strip():
        raise PromptError("the prompt is empty")
    if not chat:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not tokenizer.chat_template:
        raise PromptError("this tokenizer has no chat template: leave out --chat")
    message = [{"role": "user", "content": prompt}]
    try:
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program, which fails in ways of its own
        raise PromptError(
            f"the model's chat template cannot render the prompt: {first_line(error)}"
        ) from error
    return encoded["input_ids"]


def check_temperature(temperature: float) -> None:
    """Refuse a temperature so small that scores divided by it overflow.

    Raises:
        PromptError: names the least that works.
    """
    if temperature != 0 and not temperature >= LEAST_TEMPERATURE:
        raise PromptError(
            f"a temperature is 0 (greedy) or at least {LEAST_TEMPERATURE}, not {temperature:g}"
        )


def room_behind(model: PreTrainedModel, ids: Tensor, wanted: int) -> int:
    """How many tokens may follow a prompt ``[1, S]``; a `ChaiWarning` if that is less than wanted.

    Behind its last position a model with learned ones fails, and others write nonsense.

    Raises:
        PromptError: none.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = ids.shape[1]
    if not isinstance(most, int) or most < 1 or tokens + wanted <= most:
        return wanted
    if tokens >= most:
        raise PromptError(
            f"the prompt has {tokens:,} tokens, and this model reads at most {most:,}: shorten it"
        )
    warnings.warn(
        f"this model reads at most {most:,} tokens: at most {most - tokens:,} new ones are written",
        ChaiWarning,
        stacklevel=3,
    )
    return most - tokens


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    on_text: Callable[[str], None] = lambda text: None,
) -> Written:
    """Generate from ``ids [1, S]`` and measure; clustered heads may be enabled or not.

    Args:
        model: the model, on the device of ``ids``.
        tokenizer: its tokenizer.
        ids: the prompt.
        max_new_tokens: tokens to write at most.
        temperature: 0 is greedy decoding.
        on_text: called with each new piece of text.

    Raises:
        PromptError: a token that the model has no embedding for, a prompt that leaves no room for
            another token, or a temperature that no number can be divided by.
    """
    check_temperature(temperature)
    max_new_tokens = min(max_new_tokens, room_behind(model, ids, max_new_tokens))
    rows = model.get_input_embeddings().weight.shape[0]
    if bool((ids >= rows).any()):
        raise PromptError(
            f"the tokenizer gives the token id {int(ids.max())}, and this model embeds ids 0 to "
            f"{rows - 1}: they do not belong together"
        )
    clock = _Clock(tokenizer, on_text)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    pad = model.generation_config.pad_token_id
    if pad is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=clock,
        pad_token_id=pad,
        return_dict_in_generate=True,
        **sampling,
    )
    times = clock.times
    count = out.sequences.shape[1] - ids.shape[1]
    return Written(
        text=clock.text,
        tokens=count,
        ttft=times[0] - start,
        tpot=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        memory=memory_of(out.past_key_values),
    )
