"""Error messages of failed commands: one line of printable text."""

from __future__ import annotations

from collections.abc import Sequence

from chai_attention.errors import ChaiError, FileError

MOST = 2000  # characters of a line; longer ones quote a text that is too long to read
# how torch says that there is not enough memory, for a size that can or cannot be counted
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "storage size calculation overflowed",
    "multiplication overflow",
    "invalid buffer size",
)


def require_text(arguments: Sequence[str]) -> None:
    """Refuse arguments that are no text: nothing could print them, or open a file by them.

    Raises:
        FileError: names the argument.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise FileError(
                f"{argument!r} is no UTF-8: rename the file, or write the text in UTF-8"
            ) from None
        if "\0" in argument:
            raise FileError(f"{argument!r} holds a NUL, which no name or text can")


def explain(error: Exception) -> str | None:
    """What happened, for errors that a person can mend; None for the others, which are bugs."""
    if isinstance(error, ChaiError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    said = str(error).strip()
    memory = isinstance(error, RuntimeError) and any(w in said.lower() for w in _NO_MEMORY)
    if memory or isinstance(error, MemoryError):
        reason = f" ({said.splitlines()[0]})" if said else ""
        return f"there is not enough memory for this{reason}: ask for less at once"
    return None


def one_line(message: str) -> str:
    """A message without line breaks, without what moves a terminal's cursor, and not endless."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= MOST else f"{line[: MOST - 500]} ... {line[-490:]}"
