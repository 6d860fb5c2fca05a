"""Checks that what Triton compiles different kernels for has different `Repeated`.

Every launch is described anew and compared with the one that would have been kept for it: its
constants, other numbers that are kept beside them, and what Triton specialises of its arguments.

Run as a script, in a process of its own: Triton's driver is replaced. Nothing is compiled. Prints
the kernels, and how often each would have run as compiled.
"""

import itertools
from collections import Counter
from random import Random

import torch
from triton.runtime.jit import JITFunction

import chai_attention.ops.triton.backend as backend
import compile_for_hopper as hopper
from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, PackedKV, PackedQueries, PagedKV, Probe
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.triton.head_tiles import HeadTiles
from chai_attention.ops.triton.repeated import Launches, Repeated
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


class Forgetful(Launches):
    """Finds nothing, and compares what is made in its place with what was made first."""

    def get(self, key: object) -> None:
        return None

    def __setitem__(self, key: object, made: object) -> None:
        first, fresh = (
            x if isinstance(x, tuple) else (x,) for x in (self.setdefault(key, made), made)
        )
        fresh[0].first = first[0]
        assert first[0]._kernel is fresh[0]._kernel, key
        assert first[0]._constants == fresh[0]._constants, key
        assert first[1:] == fresh[1:], key


def launch(self: Repeated, grid, is_aligned, *arguments) -> None:
    now[:] = [self.first if is_aligned else object()]
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
    run._kinds = Forgetful()
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


def others(member: Membership, count: int, some: Random) -> None:
    """What differs between layers, not between steps, over the same tables; any strides."""

    def packed(tokens: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        if not odd:
            return torch.zeros(tokens, heads, size, dtype=dtype)
        wide, last, at = some.choice([(0, 0, 0)] * 2 + [(1, 0, 0), (0, 4, 0), (0, 8, 0), (0, 0, 2)])
        flat = torch.zeros(tokens * (heads + wide) * (size + last) + at, dtype=dtype)[at:]
        states = flat.view(tokens, heads + wide, size + last)[:, :heads, :size]
        if some.random() < 0.1:  # as transposed or repeated ones lie
            states = torch.zeros(heads, tokens, size, dtype=dtype).transpose(0, 1)
        return states[:1].expand(tokens, -1, -1) if some.random() < 0.1 else states

    def paged(tokens: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        line = tokens * heads * size
        flat = torch.zeros(4, line + some.choice([0, 8, 16, 48]) * odd, dtype=dtype)
        return flat[:, :line].view(4, tokens, heads, size)

    def table(batch: int) -> torch.Tensor:
        wide, used = some.choice([(1, 1), (15, 15), (16, 16), (16, 1), (31, 15)])
        dtype = torch.int64 if odd and some.random() < 0.3 else torch.int32
        return torch.zeros(batch, wide, dtype=dtype)[:, :used]

    odd, rare = False, some.choice([torch.float16, torch.float32])
    for _ in range(count):
        odd = some.random() < 0.3
        dtype, batch = some.choice([torch.bfloat16] * 6 + [rare]), some.choice([1, 1, 2, 16])
        dim, tokens, most = some.choice([64, 64, 80, 128]), some.choice([1, 96, 640]), 640
        value_dim, recent = some.choice([dim] * 6 + [32]), some.choice([0, 16, 20])
        if some.random() < 0.3:
            most = some.choice([16, 64])
        recent, held = recent or 16 * bool(member.streaming), member.heads
        sinks, offset, has_lse = recent and some.choice([0, 4]), None, False
        if recent:
            offsets = torch.zeros(batch, held + 3)[:, :held], torch.zeros(1, held).expand(batch, -1)
            offset = some.choice([*offsets, *([] if member.streaming else [None])])
        else:
            held, has_lse = some.choice([held, member.clusters]), some.choice([False, True])
        softcap = some.choice([None] * 6 + [1, 30.0])
        call = AttentionCall(member, some.choice([1, 0.3]), softcap, None, offset, has_lse)
        starts, lengths = (vector(n, some.choice([0, 0, 1])) for n in (batch + 1, batch))
        queries = PackedQueries(packed(tokens, held, dim, dtype), starts, most)
        out = packed(tokens, member.heads, value_dim, dtype)
        groups, keys, values = member.kv_heads, member.kept_keys, member.kept_values
        natural = bool(recent) or some.random() < 0.5
        if some.random() < 0.5:
            page, local = some.choice([16, 48, 64]), None
            if recent:
                near = (
                    paged(48, groups - keys, dim, dtype),
                    paged(48, groups - values, value_dim, dtype),
                )
                local = LocalPages(*near, table(batch), recent, sinks)
            far = paged(page, keys, dim, dtype), paged(page, values, value_dim, dtype)
            kv = PagedKV(*far, table(batch), lengths, local)
        else:
            heads = (groups, groups) if natural else (keys, values)
            new = (
                packed(tokens, n, x, dtype) for n, x in zip(heads, (dim, value_dim), strict=True)
            )
            kv = PackedKV(*new, natural, recent, sinks)
        some.choice([backend.HOPPER, backend.TRITON]).packed_prefill(queries, kv, call, out, None)


if __name__ == "__main__":
    hopper.pretend({})
    JITFunction.run, Repeated.__call__ = look, launch
    HeadTiles.launches = property(lambda self: vars(self).setdefault("launches", Forgetful()))
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
    some = Random(0)
    for groups, streaming in itertools.product((8, 4), ((), (6, 7), tuple(range(8)))):
        rep = torch.tensor([n if n in streaming else n % 2 for n in range(8)])
        others(
            Membership.from_representatives(rep, kv_heads=groups, streaming=streaming), 2500, some
        )
    print(*(f"{name}:{count}" for name, count in sorted(again.items())))
