"""Writes chats by a model's chat template, a program that may fail in any way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from chai_attention.calibration.records import Chat
from chai_attention.calibration.text_files import reason_of
from chai_attention.errors import CalibrationError

# they begin with different letters, a digit and a sign, and differ in length: what their chats
# begin with together is the template's own
MESSAGES = (
    "Why is the sky blue?",
    "please translate this sentence into French: the house is old.",
    "3 apples and 4 pears, how many fruits?",
    "(see below)\nA short story follows.",
    "Zebras",
)


class TemplateError(CalibrationError):
    """A chat that the template cannot write."""


def chat_text(tokenizer: PreTrainedTokenizerBase | None, chat: Chat) -> str:
    """Write a chat out as the model was trained to read it, special tokens included.

    Raises:
        TemplateError: the template refuses this chat, fails, or leaves out what it says.
        CalibrationError: there is no template.
    """
    if tokenizer is None:
        raise CalibrationError(
            f"{chat.where} is a chat, which only calibration reads: give plain text, or records "
            "with a field text"
        )
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"{chat.where} is a chat, and this tokenizer has no chat template: give plain text, or "
            "records with a field text"
        )
    text = rendered(tokenizer, chat.messages, f"write {chat.where}", tokenize=False)
    said = [message["content"].split() for message in chat.messages]
    if not isinstance(text, str) or not any(words and words[0] in text for words in said):
        raise TemplateError(
            f"the chat template of this tokenizer leaves out what {chat.where} says"
        )
    return text


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens before the user's text in every single-turn chat.

    These tokens, a default system prompt included, are the same in every request and say nothing
    about its content: probe tokens should be those behind them. A chat with a system prompt of its
    own has more of them.

    Returns:
        Length of the common beginning of the token ids of several chats, generation prompt
        included; the first token of the user's text is not counted even if it holds the last
        characters of the template.

    Raises:
        CalibrationError: the tokenizer has no chat template, or one that cannot be used for a
            single message of a user.
    """
    if not tokenizer.chat_template:
        raise CalibrationError(
            "this tokenizer has no chat template, behind which probe tokens could begin: let them "
            "begin at the first token"
        )
    chats = [
        rendered(
            tokenizer, [{"role": "user", "content": message}], "render a user's message",
            add_generation_prompt=True, return_dict=True,
        )["input_ids"]
        for message in MESSAGES
    ]  # fmt: skip
    for place, tokens in enumerate(zip(*chats, strict=False)):
        if len(set(tokens)) > 1:
            return place
    raise CalibrationError("the chat template of this tokenizer leaves out what the user says")


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    what: str,
    **options: Any,
) -> Any:
    """What the chat template makes of messages.

    Raises:
        TemplateError: the template cannot do ``what``, such as "render a user's message".
    """
    template: Any = tokenizer.apply_chat_template
    try:
        return template(list(messages), **options)
    except Exception as error:  # a template is a program, which fails in ways of its own
        raise TemplateError(
            f"the chat template of this tokenizer cannot {what}: {reason_of(error)}"
        ) from error
