"""Checks that what Triton compiles different kernels for has different `Repeated`.

Run as a script, in a process of its own: Triton's driver is replaced. Nothing is compiled. Prints
the kernels, and how often each would have run as compiled.
"""

import itertools
from collections import Counter

import torch
from triton.runtime.jit import JITFunction

import chai_attention.ops.triton.backend as backend
import compile_for_hopper as hopper
from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, PackedKV, PackedQueries, PagedKV, Probe
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.triton.repeated import Repeated
from chai_attention.ops.triton.write import PagedWrite

HEADS, DIM = 8, 64
known: dict[object, object] = {}  # what Triton tells apart, by launches and key
again: Counter[str] = Counter()
now: list[object] = []


def look(self: JITFunction, *args, grid, warmup, **options) -> None:
    """In place of a launch: look at arguments as Triton does."""
    if not now:
        return  # a launch of its own
    *_, binder = self.device_caches[0]
    _, special, _ = binder(*args, **options)
    seen = known.setdefault(now.pop(), special)
    again[self.fn.__name__] += seen is not special
    assert seen == special, (self.fn.__name__, seen, special)


def launch(self: Repeated, grid, is_aligned, *arguments) -> None:
    now[:] = [self if is_aligned else object()]
    self._kernel[grid](*arguments, **self._constants)


def states(tokens: int, heads: int, shift: int, fused: bool, dtype=torch.bfloat16) -> torch.Tensor:
    """``[T, heads, D]``, at any address, alone or part of more heads."""
    wide = heads * (3 if fused else 1)
    flat = torch.zeros(tokens * wide * DIM + shift, dtype=dtype)[shift:]
    return flat.view(tokens, wide, DIM)[:, :heads]


def vector(count: int, shift: int, dtype=torch.int32) -> torch.Tensor:
    return torch.zeros(count + shift, dtype=dtype)[shift:]


def write(member: Membership, local: LocalPages | None, far: tuple, is_fp8: bool) -> None:
    run = PagedWrite(*far, member, local)
    for tokens, shift, fused, ids, dtype in itertools.product(
        (1, 5, 33, 640, 700), (0, 1), (False, True), (False, True), (torch.int64, torch.int32)
    ):
        for shifts in ((shift, 0, 0), (0, shift, 0), (0, 0, shift)):
            key, value = (states(tokens, member.kv_heads, at, fused) for at in shifts[:2])
            slots = vector(tokens, shifts[2], dtype)
            for scales in ((1.0, 1.0), (0.5, 1.0)) if is_fp8 else ((1.0, 1.0),):
                room = states(tokens, member.kv_heads, shift, False)
                for stored in (None, (room, room)) if is_fp8 else (None,):
                    run(
                        key, value, slots, vector(tokens, shift) if ids else None,
                        slots if local else None, scales, stored,
                    )  # fmt: skip


def prefill(member: Membership, local: LocalPages | None, far: tuple, most: int) -> None:
    """Of ``most`` queries at most; with 8-bit pages there is no packed K and V."""
    recent, sinks = (local.recent, local.sinks) if local else (0, 0)
    is_fp8 = far[0].dtype.itemsize == 1
    for tokens, batch, shift, fused, ids, dtype, scale in itertools.product(
        (96, 640), (1, 2, 16), (0, 1, 8), (False, True), (False, True),
        (torch.int32, torch.int64), (0.3, 1),
    ):  # fmt: skip
        key, value = (states(tokens, member.kv_heads, 0, fused) for _ in range(2))
        query = states(tokens, member.heads, 0, fused)
        out = states(tokens, member.heads, shift, fused)
        starts, lengths = vector(batch + 1, shift, dtype), vector(batch, shift, dtype)
        table = torch.zeros(batch, 16 + shift, dtype=torch.int32)
        near, probe = None, Probe(query, key, value, 8)
        if local is not None:
            near = LocalPages(local.key, local.value, table, recent, sinks)
        given = [PagedKV(*far, table, lengths, near), PackedKV(key, value, True, recent, sinks)]
        choices = [None, torch.zeros(batch, member.heads)] if recent else [None]
        softcaps = (None, 30, 30.0) if scale == 1 else (None,)
        for offset, softcap, has_lse in itertools.product(choices, softcaps, (False, not recent)):
            if offset is None and member.streaming:
                continue
            rows = vector(batch, shift) if ids else None
            call = AttentionCall(member, scale, softcap, rows, offset, has_lse)
            queries = PackedQueries(query, starts, most)
            for kv in given[:1] if is_fp8 else given:
                backend.HOPPER.packed_prefill(queries, kv, call, out, None if is_fp8 else probe)


if __name__ == "__main__":
    hopper.pretend({})
    JITFunction.run, Repeated.__call__ = look, launch
    for streaming, recent, rows, is_fp8 in itertools.product(
        ((), (6, 7)), (0, 20), (1, 3), (False, True)
    ):
        if streaming and not recent:
            continue
        rep = torch.tensor([[0, 1, 0, 1, 0, 1, 6, 7] if streaming else [0, 1] * 4] * rows)
        member = Membership.from_representatives(rep, streaming=streaming)
        dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16

        def pages(tokens: int, heads: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(4, tokens, heads, DIM, dtype=dtype)

        far = pages(64, member.kept_keys), pages(64, member.kept_values)
        local = None
        if recent:
            removed = HEADS - member.kept_keys, HEADS - member.kept_values
            none = torch.zeros(1, 1, dtype=torch.int32)
            local = LocalPages(*(pages(48, n) for n in removed), none, recent, 4)
        write(member, local, far, is_fp8)
        for most in (16, 64, 640) if rows == 1 else ():
            prefill(member, local, far, most)
    print(*(f"{name}:{count}" for name, count in sorted(again.items())))
