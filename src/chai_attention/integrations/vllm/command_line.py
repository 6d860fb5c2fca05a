"""Options of ``vllm serve`` as its parser reads them, for those that clustered heads depend on.

vLLM's own parser takes longer to import than all of this takes, and estimates are made without
vLLM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chai_attention.atomic_write import read_whole
from chai_attention.errors import ProfileError

# what is looked at: by its long name, with the short one that it may have
KNOWN = {
    "--additional-config": None,
    "--attention-backend": None,
    "--attention-config": "-ac",
    "--block-size": None,
    "--config": None,
    "--config-format": None,
    "--decode-context-parallel-size": "-dcp",
    "--disable-hybrid-kv-cache-manager": None,
    "--dtype": None,
    "--enable-dbo": None,
    "--enable-prefix-caching": None,
    "--enable-sleep-mode": None,
    "--gpu-memory-utilization": None,
    "--hf-config-path": None,
    "--hf-overrides": None,
    "--kv-cache-dtype": None,
    "--kv-cache-dtype-skip-layers": None,
    "--kv-cache-memory-bytes": None,
    "--kv-offloading-size": None,
    "--kv-transfer-config": None,
    "--max-model-len": None,
    "--max-num-batched-tokens": None,
    "--max-num-seqs": None,
    "--model": None,
    "--no-disable-hybrid-kv-cache-manager": None,
    "--no-enable-dbo": None,
    "--no-enable-prefix-caching": None,
    "--no-enable-sleep-mode": None,
    "--num-gpu-blocks-override": None,
    "--performance-mode": None,
    "--pipeline-parallel-size": "-pp",
    "--prefill-context-parallel-size": "-pcp",
    "--revision": None,
    "--spec-method": None,
    "--spec-model": None,
    "--spec-tokens": None,
    "--speculative-config": "-sc",
    "--tensor-parallel-size": "-tp",
    "--trust-remote-code": None,
}
_MOST_BYTES = 2**24  # of the file that --config names
_SUFFIXES = {
    **{letter: 1000**power for power, letter in enumerate("kmgt", 1)},
    **{letter: 1024**power for power, letter in enumerate("KMGT", 1)},
}


class OptionError(ProfileError):
    """An option of vLLM that cannot be read; what a profile needs of it is unknown."""


class _Item(NamedTuple):
    """An option that is known, in the words from ``start`` to ``stop``."""

    name: str
    key: str  # of ``--name.key value``
    value: str | None
    start: int
    stop: int


class Options:
    """Options behind ``vllm serve MODEL``, and in the file that ``--config`` names.

    As vLLM's parser does, it takes ``_`` for ``-``, beginnings of names, ``--name=value``, JSON by
    its parts (``--name.key value``), and the last of several values.

    Args:
        given: the words of the command line.

    Raises:
        OptionError: the file of ``--config`` cannot be read.
    """

    def __init__(self, given: Sequence[str]):
        self._given = list(given)
        self._items = list(_items(self._given))
        file = self.text("--config")
        if file is not None:
            self._items = [*_items(_words_of(Path(file))), *self._items]

    def text(self, name: str) -> str | None:
        """The value of ``name``; None where it is not given.

        Raises:
            OptionError: it is given without a value.
        """
        found = None
        for item in self._items:
            if item.name == name and not item.key:
                if item.value is None:
                    raise OptionError(f"{name} needs a value")
                found = item.value
        return found

    def is_given(self, name: str) -> bool:
        """Whether the option is there, with a value or without."""
        return any(item.name == name for item in self._items)

    def number(self, name: str, default: float) -> float:
        """A number, which may have one of vLLM's suffixes: 8k is 8,000 and 8K is 8,192.

        Raises:
            OptionError: it is none.
        """
        text = self.text(name)
        if text is None:
            return default
        found = _number(text)
        if not math.isfinite(found):
            raise OptionError(f"{name} is a number, not {text!r}")
        return found

    def count(self, name: str, default: int) -> int:
        """A whole number from 1 on; ``default`` without one.

        Raises:
            OptionError: it is none.
        """
        found = self.number(name, default)
        if self.text(name) is not None and (found < 1 or found != int(found)):
            raise OptionError(f"{name} is a whole number from 1 on, not {self.text(name)!r}")
        return int(found)

    def switch(self, name: str) -> bool | None:
        """Whether ``--name`` is on; None where neither that nor ``--no-name`` is given."""
        off = "--no-" + name.removeprefix("--")
        found = None
        for item in self._items:
            if item.name in (name, off):
                found = item.name == name
        return found

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object, whole or by its parts; without any, an empty one.

        Raises:
            OptionError: it is none.
        """
        parts: dict[str, Any] = {}
        for item in self._items:
            if item.name == name and item.key:
                _put(parts, item)
        if parts:
            return parts
        if not self.is_given(name):
            return {}
        text = self.text(name) or ""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{name} is not JSON: {text[:80]!r}") from error
        if not isinstance(found, dict):
            raise OptionError(f"{name} must be a JSON object")
        return found

    def without(self, name: str) -> list[str]:
        """The words of the command line less those of one option."""
        gone = {
            place
            for item in _items(self._given)
            if item.name == name
            for place in range(item.start, item.stop)
        }
        return [word for place, word in enumerate(self._given) if place not in gone]


def _items(words: Sequence[str]) -> Iterator[_Item]:
    """The options that are known."""
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        option, _, key = option.partition(".")
        name = _known(option)
        if name is None:
            continue
        behind = words[place + 1] if place + 1 < len(words) else None
        if equals:
            yield _Item(name, key, value, place, place + 1)
        elif behind is None or (behind.startswith("-") and not behind[1:2].isdigit()):
            yield _Item(name, key, None, place, place + 1)
        else:
            yield _Item(name, key, behind, place, place + 2)


def _put(parts: dict[str, Any], item: _Item) -> None:
    """Set one part of an object: ``--name.key value`` or, for a list, ``--name.key+ a,b``."""
    if item.value is None:
        raise OptionError(f"{item.name}.{item.key} needs a value")
    *outer, last = item.key.removesuffix("+").split(".")
    for key in outer:
        if not isinstance(parts.get(key), dict):
            parts[key] = {}
        parts = parts[key]
    value: Any = item.value.split(",") if item.key.endswith("+") else _typed(item.value)
    if isinstance(value, list) and isinstance(parts.get(last), list):
        value = parts[last] + value
    parts[last] = value


def _typed(text: str) -> Any:
    """A part's value as vLLM reads it: JSON, else a whole number with a suffix, else text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        number = _number(text) if text[-1:] in _SUFFIXES else math.nan
        return int(number) if math.isfinite(number) else text


def _number(text: str) -> float:
    """A number, perhaps with one of vLLM's suffixes; not finite where it is none."""
    digits, factor = text, 1
    if text[-1:] in _SUFFIXES:
        digits, factor = text[:-1], _SUFFIXES[text[-1]]
    try:
        return float(digits) * factor
    except ValueError:
        return math.nan


def _known(option: str) -> str | None:
    """The long name of an option; None of one that does not matter here."""
    if not option.startswith("--"):
        return next((name for name, short in KNOWN.items() if option and short == option), None)
    written = option.replace("_", "-")
    if written in KNOWN:
        return written
    begun = [name for name in KNOWN if name.startswith(written)]
    return begun[0] if len(begun) == 1 and len(written) > len("--") else None


def _words_of(file: Path) -> list[str]:
    """The options in a file of ``--config`` as words of a command line."""
    import yaml  # type: ignore[import-untyped, unused-ignore]

    try:
        content = yaml.safe_load(read_whole(file, _MOST_BYTES).decode())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OptionError(f"cannot read {file}, which --config names: {reason}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{file}, which --config names, must hold names of options and values")
    words = []
    for name, value in content.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words.append(f"--{name}={text}")
    return words
