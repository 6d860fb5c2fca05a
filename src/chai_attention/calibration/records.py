"""Finds the text or chat in a record of a data set, and warns where it has to guess."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chai_attention.errors import CalibrationError, ChaiWarning

TEXT = "text"
CHATS = ("messages", "conversations", "conversation", "chat", "data")
# preference and completion data: a prompt of messages, and what answers it
PROMPT, ANSWERS = "prompt", ("completion", "chosen", "response")
# what ShareGPT and its like call the roles that chat templates know
ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "bard": "assistant", "model": "assistant", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
SAMPLE = 60  # characters of a guess that are shown
_LITERAL = re.compile(r"\s*\[?\s*\{\s*['\"]")  # objects of JSON or Python, whose names are no text
_IDENTIFIER = re.compile(r"[!-~]+")  # one word of ASCII: a key, a link, a hash


@dataclass(frozen=True)
class Chat:
    """Messages as a chat template takes them.

    Attributes:
        messages: role and content of each, and what else is set (tool_calls, name).
        where: file and record, for error messages.
    """

    messages: tuple[dict[str, Any], ...]
    where: str

    def __len__(self) -> int:
        """Characters of all messages."""
        return sum(len(message["content"]) for message in self.messages)


class Records:
    """Reads the records of one source.

    A record is text itself, has a field "text", or is a chat: a list of messages, or a field
    "messages", "conversations" and the like with role and content (or from and value, as in
    ShareGPT) or with turns by user and assistant (UltraChat). Of other records the longest string
    of the first is taken, and its field in those that follow: a `ChaiWarning` names it.

    Args:
        source: name of the file or data set.
    """

    def __init__(self, source: str):
        self._source = source
        self._guessed: set[str] = set()

    def content(self, record: Any, where: str) -> str | Chat | None:
        """Return the text or chat of a record; None if it is empty.

        Raises:
            CalibrationError: a record without text, or with text in a form that is not known.
        """
        if record is None or record in ({}, [], ""):
            return None
        if isinstance(record, str):
            return _encodable(record)
        if isinstance(record, list) and (messages := _messages(record)) is not None:
            return Chat(messages, where)
        if not isinstance(record, dict):
            kind = "a list, not an object" if isinstance(record, list) else "no object"
            raise CalibrationError(f"{where} has no text field: it is {kind}{_advice(record)}")
        text = record.get(TEXT)
        if isinstance(text, str) and text.strip():
            return _encodable(text)
        for value in _chats(record):
            if (messages := _messages(value)) is not None:
                return Chat(messages, where)
        if TEXT in record and (text is None or isinstance(text, str)):
            return None
        if not any(value or value == 0 for value in record.values()):
            return None
        return self._guess(record, where)

    def _guess(self, record: Mapping[str, Any], where: str) -> str:
        strings = {key: value for key, value in record.items() if isinstance(value, str)}
        for known in self._guessed & set(strings):
            return _encodable(strings[known])
        field = max(strings, key=lambda key: len(strings[key]), default=None)
        sizes = {key: _characters(record[key]) for key in record if key not in strings}
        nested = max(sizes, key=lambda key: sizes[key], default=None)
        if nested is not None and sizes[nested] > len(strings.get(field or "", "")):
            raise CalibrationError(
                f"{where}: most of its text is in {nested!r}, whose form is not known: give "
                f"records with a field text, or chats as messages of role and content"
            )
        if field is None or not strings[field].strip():
            if record.get(TEXT) is not None:
                kind = type(record[TEXT]).__name__
                raise CalibrationError(f"{where}: its {TEXT!r} is {kind}, not a string")
            raise CalibrationError(f"{where} has no text field: it has {_listed(record)}")
        text = strings[field]
        if _IDENTIFIER.fullmatch(text) or _LITERAL.match(text):
            raise CalibrationError(
                f"{where} has no text field, and {field!r} does not look like text "
                f"({shown(text)}): name the field text"
            )
        self._guessed.add(field)
        warnings.warn(
            f"{self._source} has no field text: its {field!r} is taken ({shown(text)})",
            ChaiWarning,
            stacklevel=2,
        )
        return _encodable(text)


def shown(text: str) -> str:
    """Return the beginning of a text that anybody may have written, fit for one line."""
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * SAMPLE])
    line = " ".join(line.split())
    return repr(line if len(line) <= SAMPLE else line[:SAMPLE] + "...")


def _chats(record: Mapping[str, Any]) -> list[Any]:
    """What of a record may be a chat."""
    found = [_decoded(record.get(name)) for name in CHATS]
    prompt = _decoded(record.get(PROMPT))
    for name in ANSWERS:
        answer = _decoded(record.get(name))
        if isinstance(prompt, list) and isinstance(answer, list):
            begins = answer[: len(prompt)] == prompt  # some sets repeat the prompt
            found.append(answer if begins else [*prompt, *answer])
        else:
            found.append(answer)
    return found


def _decoded(value: Any) -> Any:
    """A list that a table holds as JSON; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _messages(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Messages of role and content; None if that is not what ``value`` is, or all are empty."""
    if not isinstance(value, list) or not value:
        return None
    if len(value) > 1 and all(isinstance(turn, str) for turn in value):
        speakers = ("user", "assistant")
        value = [{"role": speakers[i % 2], "content": turn} for i, turn in enumerate(value)]
    messages = []
    for item in value:
        if not isinstance(item, dict):
            return None
        role = item.get("role") or item.get("from")
        content = _content(item.get("content", item.get("value")))
        if not isinstance(role, str) or content is None:
            return None
        rest = {
            key: value
            for key, value in item.items()
            if key not in ("role", "from", "content", "value") and value
        }
        messages.append({"role": ROLES.get(role, role), "content": _encodable(content), **rest})
    return tuple(messages) if any(message["content"] for message in messages) else None


def _content(value: Any) -> str | None:
    """Content of a message: a string, or the text of its parts; None if it is neither."""
    if value is None:
        return ""  # a call of a tool
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        texts = [part.get("text") for part in value]
        return "\n".join(text for text in texts if isinstance(text, str))
    return value if isinstance(value, str) else None


def _characters(value: Any) -> int:
    """Characters of all strings in a value of JSON."""
    waiting, total = [value], 0
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, Sequence):
            waiting += item
    return total


def _encodable(text: str) -> str:
    """A JSON string may hold half of a surrogate pair, which is no character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _advice(record: Any) -> str:
    """What to do about a list of records where one record is expected."""
    records = isinstance(record, list) and all(isinstance(item, dict) for item in record)
    return " (one list of all records is .json, not .jsonl)" if records else ""


def _listed(record: Mapping[str, Any]) -> str:
    return ", ".join(shown(str(key)) for key in list(record)[:8])
