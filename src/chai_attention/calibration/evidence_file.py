"""The file that keeps the evidence of an interrupted calibration, until its profile is written."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chai_attention.atomic_write import write_whole
from chai_attention.errors import CalibrationError, ChaiWarning

FORMAT = "chai-attention evidence 1"
EVERY = 30.0  # seconds between two writes; of less work than that nothing is kept


class EvidenceFile:
    """Tensors by name, each with the number of sequences that it is of.

    What is found in the file is used if it is about the same job, to the bit: sums go on where
    they stopped, so that the profile is the one that would have come without the interrupt.

    Args:
        path: the file; nothing is written where less than `EVERY` seconds are spent.
        about: what identifies the job: model, text, seed, sizes, versions.

    Raises:
        CalibrationError: there is another file of that name.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]):
        self.path = path
        self._about = json.dumps(about, sort_keys=True)
        self._tensors: dict[str, Tensor] = {}
        self._done: dict[str, int] = {}
        self._written = time.monotonic()
        self._changed = self._failed = False
        found = _read(path)
        if found is None:
            return
        tensors, metadata = found
        if metadata.get("about") != self._about:
            warnings.warn(
                f"{path} is of another calibration (model, text, sizes or versions differ): it is "
                "not used",
                ChaiWarning,
                stacklevel=2,
            )
            return
        self._tensors = tensors
        self._done = json.loads(metadata["done"])

    def restore(self, name: str, into: Mapping[str, Tensor]) -> int:
        """Copy what was kept under a name into tensors of the same shapes.

        Returns:
            Sequences that they are of now; 0 if there is nothing for all of them.
        """
        found = []
        for key, tensor in into.items():
            kept = self._tensors.get(f"{name}/{key}")
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                return 0
            found.append((tensor, kept))
        for tensor, kept in found:
            tensor.copy_(kept)
        return self._done.get(name, 0)

    def keep(self, name: str, tensors: Mapping[str, Tensor], done: int) -> None:
        """Remember tensors, which may change afterwards; write them if the last write is long ago.

        ``done`` is the number of sequences that they are of.
        """
        self._tensors |= {f"{name}/{key}": tensor.clone() for key, tensor in tensors.items()}
        self._done[name] = done
        self._changed = True
        self._write_if_worth_it()

    def flush(self) -> bool:
        """Write what was not written yet, if it was worth it; return whether there is a file."""
        if self._changed:
            self._write_if_worth_it()
        return self.path.is_file()

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)

    def _write_if_worth_it(self) -> None:
        from safetensors.torch import save

        if self._failed or time.monotonic() - self._written < EVERY:
            return
        metadata = {"format": FORMAT, "about": self._about, "done": json.dumps(self._done)}
        content = save({k: v.contiguous() for k, v in self._tensors.items()}, metadata)
        self._changed = False
        self._written = time.monotonic()
        try:
            write_whole(self.path, content, CalibrationError)
        except CalibrationError as error:  # the calibration itself can do without
            self._failed = True
            warnings.warn(
                f"{error}: an interrupted calibration will begin anew", ChaiWarning, stacklevel=2
            )


def check_place(path: Path) -> None:
    """Refuse a place where another file is, before anything that takes time is done.

    Raises:
        CalibrationError: names the file.
    """
    _read(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file of ours; None if there is no file."""
    from safetensors import SafetensorError, safe_open

    try:
        if not path.exists() and not path.is_symlink():
            return None
    except OSError as error:  # the name that was asked for may be as long as a name can be
        raise CalibrationError(
            f"cannot write {path}, where a calibration keeps what it has found so far: "
            f"{error.strerror}"
        ) from error
    metadata: dict[str, str] = {}
    try:
        if path.is_file():
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") == FORMAT:
                    names = file.keys()  # of a file, not of a dictionary
                    return {name: file.get_tensor(name) for name in names}, metadata
    except (OSError, SafetensorError):
        pass
    raise CalibrationError(
        f"{path} is in the way, where a calibration keeps what it has found so far: move it or "
        "delete it"
    )
