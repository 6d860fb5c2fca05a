"""Tensors of more than 2^31 numbers: of long contexts, many heads or many pages.

One tensor of a call is spread out along one of its axes (sequences, heads, tokens, pages), so that
the place of its last numbers is no 32-bit number. The memory between is never touched, so it costs
nothing.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from chai_attention.ops import AttentionCall, windowed
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.triton import local_prefill, probe
from helpers import random_membership
from kernel_calls import DEVICE, Config
from op_calls import Operations, kernels
from random_cases import check_case

BEYOND = 1 << 31
CALLS = {
    "decode": "attention",
    "prefill": "attention",
    "local": "decode_recent",
    "window": "windowed",
    "paged": "paged_decode",
    "paged local": "paged_decode",
    "paged prefill": "paged_prefill",
    "paged window": "paged_prefill",
    "varlen": "varlen_prefill",
    "varlen window": "varlen_prefill",
}


def spread(states: Tensor, axis: int) -> Tensor:
    """The same numbers, the last of ``axis`` more than 2^31 numbers behind the first."""
    packed = states.movedim(axis, 0).contiguous()
    last = packed.shape[0] - 1
    stride = BEYOND // last // 64 * 64 + 64
    memory = torch.empty(stride * last + packed[0].numel(), dtype=states.dtype, device=DEVICE)
    view = memory.as_strided(packed.shape, (stride, *packed.stride()[1:]))
    view.copy_(packed)
    return view.movedim(0, axis)


class Spreading:
    """Finds the tensors with heads among a call's arguments, and spreads one of them out."""

    def __init__(self, function, number, axis):
        self.function, self.number, self.axis = function, number, axis
        self.done = False

    def __call__(self, *args, **kwargs):
        self.seen = 0
        args = [self.changed(value) for value in args]
        # outputs, which the caller has made, hold a step's tokens only
        kwargs = {name: x if name == "out" else self.changed(x) for name, x in kwargs.items()}
        return self.function(*args, **kwargs)

    def changed(self, value):
        if isinstance(value, LocalKeys):
            return value._replace(key=self.changed(value.key), value=self.changed(value.value))
        if isinstance(value, LocalPages | RollingBuffer):
            held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **{k: self.changed(x) for k, x in held.items()})
        if not isinstance(value, Tensor) or value.ndim < 3 or not value.is_floating_point():
            return value
        self.seen += 1
        axis = self.axis
        if self.seen - 1 != self.number or axis == value.ndim - 1 or value.shape[axis] < 2:
            return value
        self.done = True
        return spread(value, self.axis)


@pytest.mark.parametrize(
    ("number", "axis"),
    [
        pytest.param(n, a, marks=() if n % 3 == a else pytest.mark.exhaustive)
        for n in range(7)
        for a in range(3)
    ],
)
@pytest.mark.parametrize("kind", CALLS)
def test_places_of_more_than_32_bits(kind, number, axis, monkeypatch):
    if axis == 1 and number == 0 and kind in ("decode", "local", "paged", "paged local"):
        pytest.skip("the one query of a sequence is small")
    if number == 3 and CALLS[kind] in ("paged_prefill", "varlen_prefill"):
        pytest.skip("what is written to, which the caller has made")
    window = kind in ("local", "window", "paged local", "paged window", "varlen window")
    config = Config(
        kind, heads=4, kv_heads=4, clusters=2, dim=16, value_dim=16, dtype=torch.float16,
        softcap=None, padded=False, spare=kind == "local", page=16, recent=5 if window else 0,
        sinks=2 if window else 0, probe_end=0, streaming=1 if window else 0, local_page=16,
    )  # fmt: skip
    call = Spreading(getattr(kernels, CALLS[kind]), number, axis)
    monkeypatch.setattr(Operations, CALLS[kind], call)
    check_case(config, number=3, most=40, full=True)
    if not call.done:
        pytest.skip("there are fewer tensors, or axes")


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_local_keys_of_prompts(axis, which):
    draw = torch.Generator().manual_seed(0)
    states = [
        torch.randn(2, 4, size, 16, generator=draw).to(DEVICE, torch.float16)
        for size in (20, 2 + 24, 2 + 24)
    ]
    member = random_membership(4, 2, 2, 4).to(DEVICE)
    tables = windowed.window_tables(40, 20, 5, 2, None, states[0].device)

    def run():
        query, key, value = states
        call = AttentionCall(member, scale=0.25)
        return local_prefill.merge_local(query, LocalKeys(key, value), tables, None, call)

    want = run()
    states[which] = spread(states[which], axis)
    assert torch.equal(run(), want)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_probe_of_a_window(axis, which):
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 4, 16, 16, generator=draw).to(DEVICE, torch.float16) for _ in range(3)]

    def run():
        maps = probe.window_maps(states[0], states[1], scale=0.25)
        return probe.output_distances(maps, states[2])

    want = run()
    states[which] = spread(states[which], axis)
    assert torch.equal(run(), want)
