"""Reading files whole, and writing them atomically."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from chai_attention.errors import ChaiError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_whole(path: str | Path, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes.

    What is no regular file is not even opened: a FIFO would wait for a writer, a device has no end.

    Raises:
        OSError: with a ``strerror`` for people, whatever is wrong.
    """
    found = _stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"it is {_kind(found)}, not a regular file")
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"its {found.st_size:,} bytes are more than {most:,}")
    with os.fdopen(os.open(path, os.O_RDONLY | _NO_WAIT), "rb") as file:
        return file.read()


def write_whole(
    path: Path, content: bytes, error: type[ChaiError], *, make_folder: bool = False
) -> None:
    """Write a file; one that was there stays as it is unless all is written.

    Only a regular file is replaced. A link stays and what it names is replaced; mode and owner
    stay. A new file gets the mode that the umask leaves.

    Args:
        path: the file.
        content: all of it.
        error: raised if the file cannot be written; its text names the file and the reason.
        make_folder: make the file's folder, and those above it, if they are missing.

    Raises:
        ChaiError: ``error``.
    """
    temporary = None
    try:
        target, found = _target(path)
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: one made from the file's could be too long
        temporary = target.parent / f".chai-{secrets.token_hex(8)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_WAIT, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            if found is not None:
                _like(file.fileno(), found)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary = None
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from reason
    finally:
        if temporary is not None:  # an interrupt, too, leaves nothing behind
            temporary.unlink(missing_ok=True)


def require_file(path: Path, error: type[ChaiError], *, make_folder: bool = False) -> None:
    """Refuse, before any work, an output that `write_whole` could not write. Writes nothing.

    Raises:
        ChaiError: ``error``, which names the file and the reason.
    """
    try:
        folder = _target(path)[0].parent
        if make_folder:
            folder = _existing(folder)
        elif not os.path.isdir(folder):
            shown = folder if os.path.islink(path) else path.parent
            raise OSError(errno.ENOENT, f"no folder {shown}")
        _require_room(folder)
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from reason


def require_folder(
    path: Path, error: type[ChaiError], names: Sequence[str] = (), what: str = ""
) -> None:
    """Refuse, before any work, a folder that files could not be written to. Makes nothing.

    Args:
        path: the folder; it, and those above it, may be missing.
        error: raised, with the folder and the reason.
        names: of the files, relative to the folder.
        what: they are, for the error, such as "plots".

    Raises:
        ChaiError: ``error``.
    """
    try:
        _require_room(_existing(path))
    except OSError as reason:
        raise error(
            f"cannot write {what}{' ' * bool(what)}to {path}: {reason.strerror}"
        ) from reason
    for name in names:
        require_file(path / name, error, make_folder=True)


def require_other(
    outputs: Iterable[Path], inputs: Iterable[str | Path], error: type[ChaiError]
) -> None:
    """Refuse outputs that are one of a command's inputs, by whatever name, or each other.

    Raises:
        ChaiError: ``error``, which names the file.
    """
    real = {place_of(path): "read by this command" for path in inputs}
    for output in outputs:
        place = place_of(output)
        if place in real:
            raise error(f"{output} is also {real[place]}: write to another file")
        real[place] = f"where {output} goes"


def place_of(path: str | Path) -> str:
    """Where a file is, links resolved; the name itself where there cannot be one."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return str(path)


def same_contents(one: str | Path, other: str | Path) -> bool:
    """Whether two names are of one regular file, or of two with the same bytes."""
    try:
        return place_of(one) == place_of(other) or filecmp.cmp(one, other, shallow=False)
    except (OSError, ValueError):  # one is no file
        return False


def _target(path: Path) -> tuple[Path, os.stat_result | None]:
    """The file that is written, links resolved, and what is there now, None for nothing."""
    _require_name(path)
    target = Path(os.path.realpath(path))
    try:
        found = _stat(target)
    except FileNotFoundError:
        return target, None
    if not stat.S_ISREG(found.st_mode):
        what = _kind(found)
        raise OSError(
            errno.EINVAL, f"it is {what}" + ("" if "folder" in what else ", not a regular file")
        )
    # a file that may not be written to is protected, even where its folder lets it be replaced
    if not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, "it is write-protected")
    return target, found


def _require_room(folder: Path) -> None:
    """An error unless files can be made in a folder that is there."""
    if not os.path.isdir(folder):
        raise OSError(errno.ENOTDIR, f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):  # a read-only disk says no to everyone
        raise OSError(errno.EACCES, f"the folder {folder} is write-protected")


def _existing(folder: Path) -> Path:
    """A folder, or the closest one above it that is there."""
    _require_name(folder)
    folder = Path(os.path.realpath(folder))
    while True:
        try:
            _stat(folder)
        except FileNotFoundError:
            folder = folder.parent
        else:
            return folder


def _like(descriptor: int, found: os.stat_result) -> None:
    """Give a new file the owner and mode of the one it replaces."""
    if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(OSError):  # only root may give a file away
            os.fchown(descriptor, found.st_uid, found.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(found.st_mode))


def _stat(path: str | Path) -> os.stat_result:
    _require_name(path)
    return os.stat(path)


def _require_name(path: str | Path) -> None:
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name holds a NUL")


def _kind(found: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
