"""The largest tensor that is made in a block, whoever makes it: torch's own operations, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Numbers of the largest memory that an operation in the block has put out."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.layout == torch.strided:
                # a view that is expanded takes no memory for its numbers
                held = made.untyped_storage().nbytes() // made.itemsize
                self.numbers = max(self.numbers, held)
        return out


@contextmanager
def largest_tensor() -> Iterator[Largest]:
    """Watch what is made in the block; in backward passes, too."""
    with Largest() as watched:
        yield watched
