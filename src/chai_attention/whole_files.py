"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from chai_attention.errors import ChaiError


def write_whole(
    path: Path, content: bytes, error: type[ChaiError], *, make_folder: bool = False
) -> None:
    """Write a file; one that was there stays as it is unless all is written.

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
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as reason:
        raise error(f"cannot write {path}: {reason.strerror}") from reason
    finally:
        if temporary is not None:  # an interrupt, too, leaves nothing behind
            Path(temporary).unlink(missing_ok=True)
