"""Reads text files piece by piece: plain text, JSON, CSV and Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from chai_attention.errors import CalibrationError, first_line

JSON_LINES, JSON = (".jsonl", ".ndjson"), (".json",)
_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
DELIMITERS, PARQUET = {".csv": ",", ".tsv": "\t"}, (".parquet",)
TABLES = (*DELIMITERS, *PARQUET)
PLAIN = (".txt", ".md", ".raw", ".gz")
FILE_SUFFIXES = (*PLAIN, *JSON_LINES, *JSON, *TABLES)
CHUNK = 1 << 20  # characters of text, or bytes of a table, that are read at a time
LARGEST_RECORD = 1 << 26  # characters
PIECE = 1 << 16  # characters of a table's first row that are looked at for what separates it
ROWS = 64  # of a Parquet file that are read at a time

# how files begin that are no text in UTF-8, and what to do with them
_OTHERS = {
    b"\x1f\x8b": "it is compressed by gzip: unpack it first",
    b"BZh": "it is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "it is compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: unpack it first",
    b"PK\x03\x04": "it is a zip archive: unpack it first",
    b"\xff\xfe": "it is UTF-16: convert it to UTF-8",
    b"\xfe\xff": "it is UTF-16: convert it to UTF-8",
}

# a record's place, for error messages, and the record
Record = tuple[str, Any]


def local_file(source: str) -> Path | None:
    """Return the file that a name means, None if it means nothing of this machine.

    Raises:
        CalibrationError: a name of a file that is not there, or of what is no regular file.
    """
    path = Path(source)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise CalibrationError(f"{source} is a folder: give a text file or a .jsonl in it")
        if path.exists():
            raise CalibrationError(f"{source} is no regular file: give a file of text")
        if path.is_symlink():
            raise CalibrationError(f"cannot read {source}: it is a link that leads to no file")
    except OSError as error:  # a name too long, links in a circle
        raise CalibrationError(f"cannot read {source}: {error.strerror}") from error
    if path.suffix.lower() in FILE_SUFFIXES or source.startswith((".", "/", "~")):
        raise CalibrationError(f"no such text file: {source}")
    return None


@contextmanager
def _opened(
    path: Path, kind: str = "text", *errors: type[Exception], **options: Any
) -> Iterator[IO[Any]]:
    """Open a file; say of these errors, and of those of the disk, that it cannot be read."""
    if "mode" not in options:
        options["encoding"] = "utf-8-sig"  # the signature that Windows writes is no text
    expected: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        with path.open(**options) as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                raise CalibrationError(
                    f"cannot read {path} as {kind}: {_no_utf8(file, error)}"
                ) from error
    except expected as error:
        raise CalibrationError(f"cannot read {path} as {kind}: {reason_of(error)}") from error


def _no_utf8(file: Any, error: UnicodeDecodeError) -> str:
    """What a file is instead, or where its first byte is that is no UTF-8."""
    if not hasattr(file, "buffer"):  # a library decodes parts of it
        return reason_of(error)
    place = file.buffer.tell() - len(error.object) + error.start  # in the file, not in a piece
    file.buffer.seek(0)
    first = file.buffer.read(8)
    for mark, what in _OTHERS.items():
        if first.startswith(mark):
            return what
    return f"byte {place:,} is no UTF-8 ({error.reason}): convert it to UTF-8"


def is_plain(path: Path) -> bool:
    """Whether a file is one document, not one of records."""
    return path.suffix.lower() not in (*JSON_LINES, *JSON, *TABLES)


def plain_pieces(path: Path, size: int) -> Iterator[str]:
    """Read a text file in pieces of at most ``size`` characters, cut between words.

    Raises:
        CalibrationError: the file cannot be read as UTF-8.
    """
    with _opened(path) as file:
        rest = ""
        while more := file.read(max(size, CHUNK)):
            _require_text(str(path), [more])
            *whole, rest = pieces_of(rest + more, size)
            yield from whole
        if rest:
            yield rest


def pieces_of(text: str, size: int) -> Iterator[str]:
    """Cut a text in pieces of at most ``size`` characters, between words if it has any."""
    start = 0
    while len(text) - start > size:
        bounds = start + size // 2, start + size
        cut = max(text.rfind("\n", *bounds), text.rfind(" ", *bounds)) + 1 or bounds[1]
        yield text[start:cut]
        start = cut
    yield text[start:]


def records_of(path: Path) -> Iterator[Record]:
    """Read the records of a file one by one.

    Raises:
        CalibrationError: the file cannot be read, or is not what its name says.
    """
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        return _rows_of_text(path, DELIMITERS[suffix])
    if suffix in PARQUET:
        return _rows_of_parquet(path)
    return _lines(path) if suffix in JSON_LINES else _values(path)


def _lines(path: Path) -> Iterator[Record]:
    """A value per line. Only a line feed ends one: JSON strings may hold those of Unicode."""
    with _opened(path, newline="\n") as file:
        number = 0
        while line := file.readline(LARGEST_RECORD):
            number += 1
            where = f"{path}, line {number}"
            if len(line) == LARGEST_RECORD:
                raise _too_large(where)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{where} is not JSON: {error}") from error
            yield where, value


def _values(path: Path) -> Iterator[Record]:
    """Values of an array, or values one after the other; only what is asked for is read."""
    with _opened(path) as file:
        decoder = json.JSONDecoder()
        buffer = file.read(CHUNK).lstrip()
        array = buffer.startswith("[")
        at = int(array)  # place in the buffer: it is not cut for every record
        number, separated = 0, False
        while True:
            where = f"{path}, record {number + 1}"
            while at < len(buffer) and buffer[at].isspace():
                at += 1
            if at == len(buffer):
                buffer, at = file.read(CHUNK), 0
                if buffer:
                    continue
                if array:
                    raise CalibrationError(f"{path} is not JSON: it ends before its array does")
                return
            if array and number and not separated:
                if buffer[at] == "]":
                    return
                if buffer[at] != ",":
                    raise CalibrationError(f"{where} is not JSON: no comma before it")
                at, separated = at + 1, True
                continue
            if array and buffer[at] == "]" and not number:
                return
            try:
                value, end = decoder.raw_decode(buffer, at)
                # a number at the end of what was read may go on
                more = file.read(CHUNK) if end == len(buffer) else ""
            except (ValueError, RecursionError) as error:
                if at:  # errors tell places from the record's beginning
                    buffer, at = buffer[at:], 0
                    continue
                more = file.read(max(CHUNK, len(buffer)))
                if not more or isinstance(error, RecursionError):
                    raise CalibrationError(f"{where} is not JSON: {error}") from error
                if len(buffer) > LARGEST_RECORD:
                    raise _too_large(where) from error
                buffer += more
                continue
            if more:
                buffer, at = buffer[at:] + more, 0
                continue
            number, separated, at = number + 1, False, end
            yield where, value


def _rows_of_text(path: Path, delimiter: str) -> Iterator[Record]:
    """Rows of a file of values separated by commas or tabs, below a row of names."""
    before = csv.field_size_limit(LARGEST_RECORD)  # of the whole process
    try:
        with _opened(path, "csv", csv.Error, newline="") as file:
            delimiter = _delimiter(file.readline(PIECE), delimiter)
            file.seek(0)
            rows = csv.DictReader(file, delimiter=delimiter, strict=True)
            names = rows.fieldnames or ()
            if twice := sorted({name for name in names if name and names.count(name) > 1}):
                raise CalibrationError(f"{path} has two columns named {twice[0][:80]!r}")
            for number, row in enumerate(rows, start=1):
                where = f"{path}, row {number}"
                if None in row:  # most often a text with a comma in it: only its beginning was read
                    raise CalibrationError(
                        f"{where} has more fields than there are names in the first row: put texts "
                        f"that hold {_NAMES[delimiter]} in double quotes"
                    )
                _require_text(where, (value for value in row.values() if value))
                yield where, row
    finally:
        csv.field_size_limit(before)


def _delimiter(names: str, usual: str) -> str:
    """What separates the names of a table: spreadsheets of many countries write semicolons."""
    return next((mark for mark in (usual, ";", "\t", "|") if mark in names), usual)


def _require_text(where: str, texts: Iterable[str]) -> None:
    """Refuse NUL, which is in binary files and, in every other place, in UTF-16 without a mark."""
    if any("\0" in text for text in texts):
        raise CalibrationError(f"{where} holds NUL: it is binary, or not UTF-8; convert it")


def _rows_of_parquet(path: Path) -> Iterator[Record]:
    """Rows of a Parquet file, some at a time."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    # columns are read as they are decoded: a group of rows may be larger than memory
    options = {"buffer_size": CHUNK, "pre_buffer": False}
    with (
        _opened(path, "parquet", ArrowException, mode="rb") as content,
        ParquetFile(content, **options) as file,
    ):
        batches = file.iter_batches(batch_size=ROWS)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row


def reason_of(error: BaseException) -> str:
    """What an error of another library or a stranger's code says, in one printable line."""
    return "".join(c if c.isprintable() else " " for c in first_line(error))[:300]


def _too_large(where: str) -> CalibrationError:
    return CalibrationError(
        f"{where} is larger than {LARGEST_RECORD >> 20} million characters: split it into records"
    )
