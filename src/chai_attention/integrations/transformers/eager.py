"""Leaving functions out of the graphs of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def eager(function: Function) -> Function:
    """Run ``function``, and what it calls, as it is where a model around it is compiled.

    Attention looks at lengths and padding on the host, has kernels of its own, and finds what it
    needs on tensors, where no graph looks.
    """
    return cast(Function, torch.compiler.disable(function))
