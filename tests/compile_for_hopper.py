"""Compiles the kernels of one kind of layer for a Hopper GPU, on a machine that has none.

Run as a script, in a process of its own: Triton's driver is replaced. Calls go to the backend as
they do on a GPU, and launches compile in place of running.

    python tests/compile_for_hopper.py default
"""

import sys
from itertools import product
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import chai_attention.ops.triton.backend as backend
from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, PackedKV, PackedQueries, PagedKV
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.triton import write

HEADS, DIM, DTYPE = 32, 128, torch.bfloat16
SHARED, STREAMS = [n % 8 for n in range(HEADS)], tuple(range(20, HEADS))
# representatives, K/V heads, streaming heads, window, 8-bit pages
KINDS = {
    "default": ([*SHARED[:20], *STREAMS], 32, STREAMS, (128, 4), False),
    "fp8 default": ([*SHARED[:20], *STREAMS], 32, STREAMS, (128, 4), True),
    "k=8": (SHARED, 32, (), None, False),
    "k=8 window": (SHARED, 32, (), (32, 4), False),
    "fp8 k=8": (SHARED, 32, (), None, True),
    "grouped streaming": ([*range(HEADS)], 8, tuple(range(16, HEADS)), (128, 4), False),
}


class Driver:
    """Stands for a driver of a Hopper GPU."""

    def get_current_target(self) -> GPUTarget:
        """Compute capability 9.0."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The usual one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")


def pretend(compiled: dict[str, object]) -> None:
    """Let kernels be chosen and compiled as on a Hopper GPU; keep what is compiled by name."""
    triton.runtime.driver.set_active(Driver())
    told = {
        "capability": lambda device: (9, 0),
        "processors": lambda device: 132,
        "check": lambda *args, **options: None,
    }
    for name, module in list(sys.modules.items()):
        for function in told if name.startswith("chai_attention.ops.triton") else ():
            if hasattr(module, function):
                setattr(module, function, told[function])
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled[self.fn.__name__] = run(self, *args, grid=(1,), warmup=True, **options)

    JITFunction.run = compile_only


def call_all(kind: str) -> None:
    """Writes, decode and prefill over pages and without, few queries and many."""
    rep, groups, streaming, window, is_fp8 = KINDS[kind]
    member = Membership.from_representatives(
        torch.tensor([rep]), kv_heads=groups, streaming=streaming
    )
    dtype = torch.float8_e4m3fn if is_fp8 else DTYPE
    recent, sinks = window or (0, 0)
    ops = backend.HOPPER

    def pages(tokens: int, heads: int, dim: int = DIM) -> torch.Tensor:
        return torch.zeros(16, tokens, heads, dim, dtype=dtype)

    def kv(batch: int) -> PagedKV:
        def table() -> torch.Tensor:
            return torch.zeros(batch, 64, dtype=torch.int32)

        lengths = torch.full((batch,), 300, dtype=torch.int32)
        local = LocalPages(
            pages(48, groups - member.kept_keys), pages(48, groups - member.kept_values), table(),
            recent, sinks,
        )  # fmt: skip
        far = pages(64, member.kept_keys), pages(64, member.kept_values)
        return PagedKV(*far, table(), lengths, local if window else None, 4096)

    def call(batch: int) -> AttentionCall:
        return AttentionCall(member, 0.1, offset=torch.zeros(batch, HEADS) if window else None)

    # far pages that hold all K heads leave nothing of K to local ones
    some = [head for head in streaming if head % 2]  # of every K/V head a query head sees far keys
    spare = Membership.from_representatives(torch.tensor([rep]), None, groups, groups, some)
    for each, value_dim in product((member, spare), (DIM, 40)):
        held, rest = (
            [pages(tokens, keys), pages(tokens, values, value_dim)]
            for tokens, keys, values in (
                (64, each.kept_keys, each.kept_values),
                (48, groups - each.kept_keys, groups - each.kept_values),
            )
        )
        slots = torch.zeros(40, dtype=torch.int64)
        local = LocalPages(*rest, slots.int()[None], recent, sinks) if window else None
        new = [torch.zeros(40, groups, dim, dtype=DTYPE) for dim in (DIM, value_dim)]
        write.write_paged(*new, *held, slots, each, None, local, slots)
    for batch in (4, 256):
        query = torch.zeros(batch, HEADS, DIM, dtype=DTYPE)
        ops.paged_decode(query, kv(batch), call(batch), torch.zeros_like(query))
    for tokens in (40, 640):
        query = torch.zeros(tokens, HEADS, DIM, dtype=DTYPE)
        states = torch.zeros(2, tokens, groups, DIM, dtype=DTYPE)
        starts = torch.tensor([0, tokens // 2 - 7, tokens], dtype=torch.int32)
        queries = PackedQueries(query, starts, tokens // 2 + 7)
        given = [kv(2)] if is_fp8 else [kv(2), PackedKV(*states, True, recent, sinks)]
        for each in given:
            ops.packed_prefill(queries, each, call(2), torch.zeros_like(query), None)


if __name__ == "__main__":
    made: dict[str, SimpleNamespace] = {}
    pretend(made)
    call_all(sys.argv[1])
    print(*(name for name, kernel in sorted(made.items()) if kernel.asm["cubin"]))
