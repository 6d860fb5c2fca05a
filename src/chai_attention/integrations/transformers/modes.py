"""The mode that measurements run a model in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without dropout, which would make every measurement a different one.

    Afterwards every module is in the mode it was in: a model that is trained in parts, with
    frozen ones in eval mode, comes back as it was.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
