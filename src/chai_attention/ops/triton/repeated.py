"""Launches that come again and again, without Triton's look at each of their arguments.

Triton finds the kernel that it compiled by looking at every argument of a launch, at what it is and
whether it is a multiple of 16. For the kernels of a layer that takes 15 to 30 us on the host, in
every layer of every step of a server. Most arguments never change, and of the others the caller
knows what matters.
"""

from __future__ import annotations

from collections.abc import Hashable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

MOST = 256  # launches that are kept of tables or pages; a server has some dozen kinds


class Repeated:
    """Launches that the same compiled kernel runs.

    From one to the next, no dtype changes, no number that the kernel specialises, and no address
    that it specialises but of the tensors that `aligned` is asked about.

    Args:
        kernel: Triton's or Gluon's.
        constants: what it is compiled for, and options of the compiler.
    """

    def __init__(self, kernel: Any, **constants: Any):
        self._kernel, self._constants = kernel, constants
        self._compiled: CompiledKernel | None = None
        self._values: tuple[Any, ...] = ()  # of the constants, in the kernel's order

    def __call__(self, grid: tuple[int, int, int], is_aligned: bool, *arguments: Any) -> None:
        """Launch.

        Args:
            grid: programs.
            is_aligned: whether all tensors that may lie elsewhere than before are `aligned`. If
                not, Triton looks.
            arguments: all that come before the constants.
        """
        if is_aligned and self._compiled is not None:
            self._compiled[grid](*arguments, *self._values)
            return
        made = self._kernel[grid](*arguments, **self._constants)
        if is_aligned and isinstance(made, CompiledKernel):  # the interpreter compiles nothing
            names = self._kernel.arg_names[len(arguments) :]
            self._values = tuple(self._constants[name] for name in names)
            self._compiled = made

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with what it launches over: the copy compiles for itself.

        What is compiled belongs to a GPU of this process, and Triton's kernels cannot be copied.
        """
        kernel = self._kernel.fn
        return _of_kernel, (kernel.__module__, kernel.__name__, self._constants)


def _of_kernel(module: str, name: str, constants: dict[str, Any]) -> Repeated:
    """Launches of a kernel by its name."""
    return Repeated(getattr(import_module(module), name), **constants)


class Launches(dict[Hashable, Any]):
    """Launches and what is kept beside them, by what they are compiled for.

    Strides are part of that, and of transposed tensors they differ with every number of tokens. So
    there is a bound, behind which all are made anew.
    """

    def __setitem__(self, key: Hashable, made: Any) -> None:
        """Keep one more."""
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(key, made)

    def keep(self, key: Hashable, kernel: Any, **constants: Any) -> Repeated:
        """Launches of a kernel, made and kept; for a key that has none yet."""
        made = self[key] = Repeated(kernel, **constants)
        return made


def aligned(*tensors: Tensor) -> bool:
    """Whether all of them begin at multiples of 16 bytes."""
    at = 0
    for tensor in tensors:
        at |= tensor.data_ptr()
    return not at % 16


def dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    """Their dtypes, of those that are there."""
    return [None if tensor is None else tensor.dtype for tensor in tensors]
