"""Launches that skip Triton's look at their arguments run the kernel that it would have found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import CompiledKernel

from chai_attention.ops.triton.repeated import Repeated, aligned

SCRIPT = Path(__file__).parents[2] / "keys_of_launches.py"
KERNELS = {
    "_plan", "_prefill", "_prefill_window", "_write", "prefill_hopper", "prefill_paged_window",
    "prefill_window",
}  # fmt: skip


class Compiled(CompiledKernel):
    """Keeps what it is launched with."""

    def __init__(self, launched: list) -> None:
        self.launched = launched

    def __del__(self) -> None:
        """There is no module to unload."""

    def __getitem__(self, grid):
        return lambda *args: self.launched.append(("compiled", grid, args))


class Kernel:
    """A kernel whose launch is looked at, and then compiled."""

    arg_names = ("x_ptr", "size", "BLOCK", "HAS_IDS")

    def __init__(self, compiles: bool) -> None:
        self.launched, self.compiles = [], compiles

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launched.append(("looked at", grid, args, constants))
            return Compiled(self.launched) if self.compiles else None

        return launch


def test_only_the_first_launch_is_looked_at() -> None:
    constants = {"HAS_IDS": True, "BLOCK": 64, "num_warps": 4}
    kernel = Kernel(compiles=True)
    launch = Repeated(kernel, **constants)
    for size, is_aligned in ((1, False), (2, True), (3, True), (4, False), (5, True)):
        launch((size, 1, 1), is_aligned, "x", size)
    assert kernel.launched == [
        ("looked at", (1, 1, 1), ("x", 1), constants),
        ("looked at", (2, 1, 1), ("x", 2), constants),
        ("compiled", (3, 1, 1), ("x", 3, 64, True)),
        ("looked at", (4, 1, 1), ("x", 4), constants),
        ("compiled", (5, 1, 1), ("x", 5, 64, True)),
    ]


def test_the_interpreter_gets_every_launch() -> None:
    kernel = Kernel(compiles=False)
    launch = Repeated(kernel, BLOCK=64, HAS_IDS=False)
    for _ in range(3):
        launch((1, 1, 1), True, "x", 1)
    assert [kind for kind, *_ in kernel.launched] == ["looked at"] * 3


def test_alignment_is_that_of_addresses() -> None:
    x = torch.zeros(64, dtype=torch.bfloat16)
    assert aligned(x, x[8:], x[16:])
    assert not aligned(x, x[8:], x[1:])


def test_launches_that_triton_tells_apart_are_kept_apart() -> None:
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, SCRIPT], env=settings, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    repeated = dict(each.split(":") for each in result.stdout.split())
    assert repeated.keys() == KERNELS
    assert min(map(int, repeated.values())) > 100
