"""Launches that skip Triton's look at their arguments run the kernel that it would have found."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import CompiledKernel

from chai_attention.ops.triton.head_tiles import head_tiles_of
from chai_attention.ops.triton.hopper_work import _plan
from chai_attention.ops.triton.repeated import MOST, Launches, Repeated, aligned
from chai_attention.ops.triton.write import PagedWrite
from helpers import random_membership
from op_calls import kernels

SCRIPT = Path(__file__).parents[2] / "keys_of_launches.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda made: pickle.loads(pickle.dumps(made))}
KERNELS = {
    "_join", "_plan", "_prefill", "_prefill_window", "_write", "prefill_hopper",
    "prefill_paged_window", "prefill_window",
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


def test_lengths_that_never_repeat_fill_no_memory(monkeypatch) -> None:
    """Of transposed K and V every number of tokens has strides of its own."""
    monkeypatch.setattr(Repeated, "__call__", lambda *args: None)
    member = random_membership(4, 2, 1)
    write = PagedWrite(torch.zeros(4, 16, 2, 16), torch.zeros(4, 16, 4, 16), member, None)
    for tokens in range(1, 2 * MOST + 10):
        states = torch.zeros(4, tokens, 16).transpose(0, 1)
        slots = torch.zeros(tokens, dtype=torch.int64)
        write(states, states, slots, None, None, (1.0, 1.0), None)
        assert 0 < len(write._kinds) <= MOST
    assert isinstance(head_tiles_of(member, 2).launches, Launches)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_compiles_for_itself(copied) -> None:
    constants = {"HEAD_TILES_P": 4, "M": 2, "TILE": 128, "HAS_IDS": False, "num_warps": 4}
    launch = Repeated(_plan, **constants)
    launch._compiled = Compiled([])
    made = copied({"by key": launch})["by key"]
    assert made._kernel is _plan
    assert made._constants == constants
    assert made._compiled is None


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_membership_can_be_copied_once_kernels_have_run(copied) -> None:
    """As the cache of a prompt is, for each of its continuations."""
    member = random_membership(6, 2, 1).to(DEVICE)
    query, key, value = torch.randn(3, 9, 6, 16, device=DEVICE)
    starts = torch.tensor([0, 9], dtype=torch.int32, device=DEVICE)

    def attend(member):
        out = torch.empty_like(query)
        kernels.varlen_prefill(
            query, key, value, member, out, query_starts=starts, most_queries=9, scale=0.3,
            natural_order=True,
        )  # fmt: skip
        return out

    want, other = attend(member), copied(member)
    assert torch.equal(attend(other), want)
    assert torch.equal(attend(member), want)


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
