"""Compiles kernels for a Hopper GPU, or for an older one, on a machine that has none.

Run as a script, in a process of its own: Triton's driver is replaced. Calls go to the backend as
they do on a GPU, and launches compile in place of running. Either those of a kind of layer on a
Hopper GPU, or calls of `kernel_calls` of many shapes on a GPU of a compute capability.

    python tests/compile_for_hopper.py default
    python tests/compile_for_hopper.py 8.9
"""

import sys
from itertools import product
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import chai_attention.ops.triton.backend as backend
import kernel_calls
from chai_attention.clustering.kmeans import TIE
from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, PackedKV, PackedQueries, PagedKV
from chai_attention.ops.fp8 import FLOAT8
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.probe import HeadClustering
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.triton import online, widen, write
from helpers import random_membership
from op_calls import Operations
from page_writes import launch_paged
from random_cases import sequence

HEADS, DIM, DTYPE = 32, 128, torch.bfloat16
# that a program can have, by compute capability
SHARED_BYTES = {(8, 0): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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


# heads, K/V heads, clusters, streaming heads, sizes of K and V: of one padded size and of two,
# grouped queries, local K/V heads for K alone, nothing but heads that stream, the largest heads
SHAPES = [
    (9, 9, 4, 0, 48, 40), (6, 6, 2, 2, 40, 24), (9, 3, 2, 4, 128, 80), (6, 3, 0, 6, 24, 80),
    (2, 2, 1, 0, 256, 256),
]  # fmt: skip
# kind of call, queries and tokens of sequences, options; what has a window may stream
CALLS = [
    ("decode", [(1, 70), (1, 70)], {"spare": True}),
    ("prefill", [(33, 67, 9), (33, 67, 0)], {"padded": True}),
    ("local", [(1, 40), (1, 9)], {"recent": 9, "sinks": 3}),
    ("window", [(20, 70), (20, 70)], {"recent": 9, "sinks": 3}),
    ("paged", [(1, 63), (1, 129)], {"softcap": 5.0}),
    ("paged local", [(1, 63), (1, 129)], {"recent": 20, "sinks": 4, "tables": "rows"}),
    ("paged prefill", [(70, 110), (1, 129)], {"probe_end": 5}),
    ("paged window", [(70, 110), (1, 129)], {"recent": 20, "sinks": 4, "tables": "rows"}),
    ("paged prefill", [(9, 1200)], {"softcap": 5.0, "lse": False}),
    ("paged window", [(33, 1200)], {"recent": 20, "sinks": 4, "tables": "rows"}),
    ("varlen", [(5, 5), (63, 63)], {"softcap": 5.0, "natural": True}),
    ("varlen window", [(5, 5), (63, 63)], {"recent": 20, "sinks": 4, "natural": True}),
    ("paged window", [(33, 1200)], {"recent": 20, "sinks": 4, "offsets": False}),
]  # fmt: skip


class Driver:
    """Stands for a driver of a GPU of a compute capability."""

    def __init__(self, capability: tuple[int, int]):
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        """Of that compute capability."""
        return self.target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The usual one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")


def pretend(compiled: dict[str, object], capability: tuple[int, int] = (9, 0)) -> None:
    """Let kernels be chosen and compiled as on such a GPU; keep what is compiled by name."""
    triton.runtime.driver.set_active(Driver(capability))
    told = {
        "capability": lambda device: capability,
        "processors": lambda device: 132,
        "shared_bytes": lambda device: SHARED_BYTES[capability],
        "check": lambda *args, **options: None,
    }
    for name, module in list(sys.modules.items()):
        for function in told if name.startswith("chai_attention.ops.triton") else ():
            if hasattr(module, function):
                setattr(module, function, told[function])
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = compiled[self.fn.__name__] = run(self, *args, grid=(1,), warmup=True, **options)
        # which only a launch would refuse
        assert kernel.metadata.shared <= SHARED_BYTES[capability], (
            self.fn.__name__, kernel.metadata.shared, options
        )  # fmt: skip

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
        launch_paged(*new, *held, slots, each, None, local, slots)
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


def call_shapes(capability: tuple[int, int]) -> None:
    """Every kernel of `CALLS` in `SHAPES`, whose dtypes take turns, and those that choose heads."""
    kernel_calls.kernels = Operations(backend.HOPPER if capability[0] == 9 else backend.TRITON)
    pairs = product(enumerate(SHAPES), enumerate(CALLS))
    for (at, shape), (number, (kind, sizes, options)) in pairs:
        heads, groups, clusters, streaming, dim, value_dim = shape
        dtype = DTYPES[(at + number) % 3]
        if streaming and "recent" not in options:
            continue
        is_paged = kind.startswith("paged") and dtype != torch.float32 and capability >= (8, 9)
        for stored in (None, FLOAT8) if is_paged else (None,):
            member = random_membership(heads, clusters, len(sizes), groups, streaming)
            config = kernel_calls.Config(
                kind, heads, groups, clusters, dim, value_dim, dtype, streaming=streaming,
                stored=stored, **(options if not streaming else options | {"probe_end": 0}),
            )  # fmt: skip
            sequences = [sequence(config, *size) for size in sizes]
            kernel_calls.RUN[kind](kernel_calls.Case(config, member, sequences, 0.1))
        if kind == "local":
            write_ring(member, dim, value_dim, dtype)
    query, key, value = (torch.zeros(2, 6, 16, 64, dtype=DTYPE) for _ in "qkv")
    for by_means, given in ((True, None), (False, None), (False, value)):
        how = HeadClustering(2, 0.1, None, TIE, by_means)
        online.membership_of_window(query, key, given, how)
    pages, wide = torch.zeros(4, 16, 3, 40).to(FLOAT8), torch.zeros(2, 16, 3, 40, dtype=DTYPE)
    if capability >= (8, 9):
        widen.widen_pages(pages, torch.tensor([0, 2]), wide)


def write_ring(member: Membership, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    """New tokens to a dense cache and to the memory of what it does not hold."""
    batch, groups = member.batch, member.kv_heads
    rest = groups - member.kept_keys, groups - member.kept_values

    def room(heads: int, tokens: int, size: int) -> torch.Tensor:
        return torch.zeros(batch, heads, tokens, size, dtype=dtype)

    memories = [
        [room(n, tokens, size) for tokens in (8, 3)] if n else [None, None]
        for n, size in zip(rest, (dim, value_dim), strict=True)
    ]
    local = RollingBuffer(
        *memories[0], torch.zeros(batch, 3, dtype=torch.int32), 8, 0, *memories[1]
    )
    write.write_dense(
        room(groups, 5, dim), room(groups, 5, value_dim), room(member.kept_keys, 20, dim),
        room(member.kept_values, 20, value_dim), member, torch.zeros(batch, dtype=torch.int32),
        local if rest[0] else None,
    )  # fmt: skip


if __name__ == "__main__":
    made: dict[str, SimpleNamespace] = {}
    if sys.argv[1] in KINDS:
        pretend(made)
        call_all(sys.argv[1])
    else:
        major, minor = map(int, sys.argv[1].split("."))
        pretend(made, (major, minor))
        call_shapes((major, minor))
    print(*(name for name, kernel in sorted(made.items()) if kernel.asm["cubin"]))
