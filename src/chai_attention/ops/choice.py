"""Which code attends on this CPU: our blocks of matrix products, or torch's fused attention.

Neither is faster everywhere. In bfloat16, torch's kernel may be twice as fast as in float32 on one
CPU, and several times slower than plain products on another. So both run a small problem once for
each kind of call, and this process takes the faster one from then on. They differ by rounding only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops import blocked, dense, fused
from chai_attention.ops.call import AttentionCall, DenseKV

logger = logging.getLogger("chai_attention")

AUTO, BLOCKED, TORCH = "auto", "blocked", "torch"
NAMES = (AUTO, BLOCKED, TORCH)
VARIABLE = "CHAI_CPU_ATTENTION"  # of the environment: one of `NAMES`
_USUAL = "usual"  # stands for what is `usual`, in `reproducible`

LONG = 1024  # keys from which a call counts as a long one
TRIALS = 3
FASTER = 0.9  # part of our code's time that torch's has to stay below
HEADS, CLUSTERS = 8, 2  # of the small problem
# queries and keys of it, for short and long calls
SIZES = {True: ((1, 512), (1, 2048)), False: ((64, 64), (128, 512))}

Attend = Callable[[Tensor, DenseKV, AttentionCall], tuple[Tensor, Tensor | None]]
# by whether heads share scores
RUN: dict[bool, dict[str, Attend]] = {
    True: {BLOCKED: blocked.blocked_attention, TORCH: fused.torch_clustered_attention},
    False: {BLOCKED: blocked.blocked_attention, TORCH: dense.torch_attention},
}

_given: ContextVar[str | None] = ContextVar("cpu_attention", default=None)
_lock = threading.RLock()


class Kind(NamedTuple):
    """What calls have in common for which one choice is made.

    Attributes:
        decode: whether there are a few queries only.
        clustered: whether heads share scores.
        dtype: of Q, K and V.
        head_dim: D.
        long: whether there are many keys.
        threads: of torch.
    """

    decode: bool
    clustered: bool
    dtype: torch.dtype
    head_dim: int
    long: bool
    threads: int


_found: dict[Kind, str] = {}  # what was measured in this process


@contextmanager
def cpu_attention(name: str) -> Iterator[None]:
    """Decide which code attends on the CPU inside of a ``with`` block.

    Args:
        name: "blocked", blocks of matrix products; "torch", torch's fused attention wherever it
            can be used (no softcap, V as wide as K); "auto", the faster one of this machine.
            It counts for more than the environment's ``CHAI_CPU_ATTENTION``.

    Raises:
        AttentionInputError: another name.
    """
    token = _given.set(_checked(name, "cpu_attention() takes"))
    try:
        yield
    finally:
        _given.reset(token)


@contextmanager
def reproducible() -> Iterator[None]:
    """Take what is usual in place of what is measured, in a ``with`` block or a decorated function.

    For results that must not depend on how long something took: another process, or another run,
    may find the other code faster, which rounds otherwise. What was decided by hand stays so.
    """
    token = _given.set(_given.get() or _USUAL)
    try:
        yield
    finally:
        _given.reset(token)


def kind_of(query: Tensor, keys: int, *, clustered: bool) -> Kind:
    """Kind of a call with ``query [B, heads, Q, D]`` and so many keys."""
    return Kind(
        query.shape[2] <= blocked.DECODE_ROWS,
        clustered,
        query.dtype,
        query.shape[3],
        keys > LONG,
        torch.get_num_threads(),
    )


def chosen(kind: Kind) -> str:
    """``BLOCKED`` or ``TORCH`` for a kind of call; measures if nothing else is known.

    Nothing is measured while a graph is traced, where it is what is `usual`.

    Raises:
        AttentionInputError: the environment's ``CHAI_CPU_ATTENTION`` is none of `NAMES`.
    """
    name = _given.get()
    if name in (None, _USUAL):
        by_hand = _checked(os.environ.get(VARIABLE, AUTO), f"{VARIABLE} is")
        name = by_hand if by_hand != AUTO else name or AUTO
    if name == _USUAL:
        return usual(kind)
    if name is not None and name != AUTO:
        return name
    if kind in _found:
        return _found[kind]
    if torch.compiler.is_compiling():
        return usual(kind)
    with _lock:  # one measurement at a time, so that they do not disturb each other
        if kind not in _found:
            _found[kind] = measured(kind)
            logger.info("attention on the CPU: %s for %s", _found[kind], kind)
    return _found[kind]


def fastest(query: Tensor, kv: DenseKV, call: AttentionCall) -> Attend:
    """What attends on the CPU in such a call."""
    plain = is_plain(kv, call)
    return RUN[not plain][chosen(kind_of(query, kv.key.shape[2], clustered=not plain))]


def is_plain(kv: DenseKV, call: AttentionCall) -> bool:
    """Whether a call is attention without clusters, spare capacity, softcap or log-sum-exp."""
    return (
        call.membership.is_identity
        and kv.lengths is None
        and call.softcap is None
        and not call.return_lse
    )


def usual(kind: Kind) -> str:
    """What is faster on most machines."""
    return BLOCKED if kind.clustered or kind.decode else TORCH


def measured(kind: Kind) -> str:
    """What is faster on this machine: takes some milliseconds."""
    return faster(candidates(kind))


def faster(
    calls: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> str:
    """Name of the faster one of two calls; our own where there is little between them.

    Args:
        calls: by `BLOCKED` and `TORCH`.
        clock: tells the time.
    """
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(TRIALS):  # in turn, so that what else goes on meets both
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return TORCH if best[TORCH] < FASTER * best[BLOCKED] else BLOCKED


def candidates(kind: Kind) -> dict[str, Callable[[], object]]:
    """Both ways to attend to a small problem of a kind."""
    queries, size = SIZES[kind.decode][kind.long]
    members = HEADS // CLUSTERS if kind.clustered else 1
    rep = torch.arange(HEADS, device="cpu") // members * members
    member = Membership(rep[None], HEADS // members, HEADS, HEADS // members)

    def states(heads: int, tokens: int) -> Tensor:
        shape = (1, heads, tokens, kind.head_dim)
        return torch.full(shape, 0.01, dtype=kind.dtype, device="cpu")

    query = states(member.clusters, queries)
    kv = DenseKV(states(member.clusters, size), states(HEADS, size))
    attention_call = AttentionCall(member, scale=0.1)

    def run(attend: Attend) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return attend(query, kv, attention_call)

        return call

    return {name: run(attend) for name, attend in RUN[kind.clustered].items()}


def _checked(name: str, what: str) -> str:
    if name not in NAMES:
        raise AttentionInputError(f"{what} auto, blocked or torch, not {name!r}")
    return name
