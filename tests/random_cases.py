"""Random cases of every attention kernel against the definition in float64.

A case is a number: its configuration (what a kernel is compiled for) follows from the number
modulo `CONFIGURATIONS`, its sizes and contents from the number itself.
"""

from __future__ import annotations

import math
import os
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops import reference
from helpers import TOLERANCE, clustered_inputs, random_membership
from kernel_calls import DEVICE, RUN, Case, Config, Sequence

Size = tuple[int, int] | tuple[int, int, int]  # queries, keys, and how many of them are padding

CONFIGURATIONS = 48
KINDS = ("decode", "prefill", "local", "paged", "paged local", "paged prefill", "varlen", "prefill")
# with CHAI_RANDOM_STREAMING=1: an exact window alone, and heads that stream
STREAMING = os.environ.get("CHAI_RANDOM_STREAMING") == "1"
STREAMING_KINDS = ("local", "window", "paged local", "paged window", "varlen window")
PROBED = ("paged prefill", "varlen", "paged window", "varlen window")


def config_of(number: int) -> Config:
    """The configuration of a case."""
    if STREAMING:
        return _streaming_config(number)
    draw = random.Random(number % CONFIGURATIONS)
    kind = KINDS[number % len(KINDS)]
    heads, kv_heads = draw.choice([(8, 8), (9, 9), (12, 12), (32, 32), (52, 52), (9, 3), (8, 1)])
    dim = draw.choice([48, 64, 80, 96, 128, 128, 256])
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    if DEVICE == "cpu":
        dtypes = [torch.float16, torch.float32]  # the interpreter multiplies bfloat16 wrongly
    dense = kind in ("decode", "prefill", "local")
    plain = kind == "prefill" and draw.random() < 0.5  # as the kernel for Hopper takes it
    clusters = draw.choice([1, max(1, heads // 8), heads // 2, heads - 1, heads])
    if "local" in kind:
        clusters = min(clusters, heads - 1)
    return Config(
        kind, heads, kv_heads, clusters, dim,
        value_dim=draw.choice([dim, dim, dim, 40]) if not plain else dim,
        dtype=draw.choice(dtypes),
        softcap=None if plain else draw.choice([None, None, 5.0]),
        padded=dense and not plain and draw.random() < 0.4,
        spare=kind == "local" or (dense and not plain and draw.random() < 0.5),
        page=draw.choice([16, 32, 48, 64]),
        recent=draw.choice([1, 5, 32]) if "local" in kind else 0,
        sinks=draw.choice([0, 1, 4]),
        local_page=draw.choice([16, 48, 64]),
        probe_end=draw.choice([0, 5, 32]) if kind in PROBED else 0,
    )  # fmt: skip


def _streaming_config(number: int) -> Config:
    draw = random.Random(f"streaming {number % CONFIGURATIONS}")
    kind = STREAMING_KINDS[number % len(STREAMING_KINDS)]
    heads, kv_heads = draw.choice([(8, 8), (9, 9), (12, 12), (32, 32), (9, 3), (12, 4), (8, 1)])
    # as the kernel for Hopper takes it
    hopper = kind in ("window", "varlen window", "paged local", "paged window")
    hopper = hopper and draw.random() < 0.7
    dim = draw.choice([64, 128, 128]) if hopper else draw.choice([48, 64, 80, 96, 128, 256])
    dtypes = [torch.bfloat16, torch.float16] + [torch.float32] * (not hopper)
    if DEVICE == "cpu":
        dtypes = [torch.float16, torch.float32]
    streaming = draw.choice([0, 1, heads // 3, heads // 2, heads - 1, heads])
    left = heads - streaming
    return Config(
        kind, heads, kv_heads,
        clusters=draw.choice([1, max(1, left // 2), left]) if left else 0,
        dim=dim,
        value_dim=dim if hopper else draw.choice([dim, dim, 40]),
        dtype=draw.choice(dtypes),
        softcap=None if hopper else draw.choice([None, 5.0]),
        padded=kind in ("local", "window") and not hopper and draw.random() < 0.4,
        spare=kind == "local",
        page=draw.choice([16, 48, 64]) if kind.startswith("paged") else 16,
        recent=draw.choice([1, 5, 32, 128, 200]),
        sinks=draw.choice([0, 1, 4, 16]),
        probe_end=draw.choice([0, 5, 32]) if kind in PROBED and not streaming else 0,
        streaming=streaming,
        local_page=draw.choice([16, 32, 48, 64]),
    )  # fmt: skip


def run_case(number: int, most: int) -> None:
    """Run one case of up to ``most`` tokens a sequence; raises AssertionError with its name."""
    check_case(config_of(number), number, most)


def check_case(config: Config, number: int, most: int, full: bool = False) -> None:
    """Run a configuration with the sizes and contents of a number; ``full``: the largest sizes."""
    draw = random.Random(number)
    torch.manual_seed(number)
    batch = draw.choice([1, 2, 3, 5])
    member = random_membership(
        config.heads, config.clusters, batch, config.kv_heads, config.streaming
    ).to(DEVICE)
    sizes = _sizes(config, batch, draw, most, full)
    check(config, member, sizes, f"case {number}")


def check_sizes(config: Config, sizes: list[Size]) -> None:
    """Run a configuration on random sequences of these sizes; no error is above `TOLERANCE`."""
    batch = len(sizes)
    member = random_membership(
        config.heads, config.clusters, 1 if config.tables == "shared" else batch,
        config.kv_heads, config.streaming,
    ).expand(batch).to(DEVICE)  # fmt: skip
    check(config, member, sizes, "case", TOLERANCE[config.dtype])


def check(
    config: Config,
    member: Membership,
    sizes: list[Size],
    name: str,
    tolerance: float = math.inf,
) -> None:
    """Compare a call with the definition, sequence by sequence.

    The error may be twice what torch's own attention loses in this dtype on these inputs, and four
    units of rounding, but not more than ``tolerance``.
    """
    case = Case(config, member, [sequence(config, *size) for size in sizes], config.dim**-0.5)
    results, lse = RUN[config.kind](case)
    offsets, batch = case.offsets, len(sizes)
    for row, (one, out) in enumerate(zip(case.sequences, results, strict=True)):
        if not one.query.shape[1]:
            continue
        named = f"{name} ({config}), sequence {row} of {batch}: {one.query.shape[1]} queries, "
        named += f"{one.key.shape[1]} keys"
        if not one.key.shape[1]:
            assert not out.any(), named
            assert lse is None or bool((lse[row] == -torch.inf).all()), named
            continue
        rows = member.select(torch.tensor([row], device=DEVICE))
        want, want_lse = _definition(
            config, one, rows, case.scale, None if offsets is None else offsets[0]
        )
        error = (out.double() - want).abs().max().item()
        allowed = 2 * _loss(config, one, rows, case.scale) + 4 * torch.finfo(config.dtype).eps
        allowed = min(allowed, tolerance)
        assert error <= allowed, f"{named}: off by {error:.3g}, allowed {allowed:.3g}"
        if lse is not None:
            torch.testing.assert_close(
                lse[row], want_lse, atol=2e-3, rtol=1e-3, msg=lambda text, n=named: f"{n}: {text}"
            )


def _sizes(config: Config, batch: int, draw: random.Random, most: int, full: bool) -> list[Size]:
    """Random sizes; dense ones have equally many queries, without spare room equal sizes."""
    sizes = [n for n in (1, 2, 63, 64, 65, 129, 130, 257) if n <= most] + [draw.randint(1, most)]
    sizes = [most] if full else sizes
    decode = config.kind in ("decode", "local", "paged", "paged local")
    packed = config.kind in ("paged prefill", "varlen", "paged window", "varlen window")
    queries = 1 if decode else draw.choice(sizes)
    size = max(queries, draw.choice(sizes))
    found = []
    for _ in range(batch):
        if packed:
            queries = draw.choice([0, 1, *sizes])
            size = (
                queries if config.kind.startswith("varlen") else queries + draw.choice([0, *sizes])
            )
        elif config.spare or config.kind.startswith("paged"):
            size = max(queries, draw.choice(sizes))
        found.append((queries, size, draw.randrange(size) if config.padded else 0))
    return found


def sequence(config: Config, queries: int, size: int, first: int = 0) -> Sequence:
    """Random Q, K and V, of which ``first`` tokens are padding."""
    query, key, value = (
        torch.randn(heads, tokens, width, device=DEVICE).to(config.dtype)
        for heads, tokens, width in (
            (config.heads, queries, config.dim),
            (config.kv_heads, size, config.dim),
            (config.kv_heads, size, config.value_dim),
        )
    )
    if config.stored is not None:
        key, value = (x.to(config.stored).to(config.dtype) for x in (key, value))
    return Sequence(query, key, value, first if config.padded else 0)


# ---- the definition


def _definition(
    config: Config, one: Sequence, member: Membership, scale: float, offsets: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``[Q, H, Dv]`` in float64 and the log-sum-exp ``[k, Q]``."""
    query, key, value = (x.double()[None] for x in (one.query, one.key, one.value))
    options = {"scale": scale, "softcap": config.softcap, "valid": one.valid[None]}
    if config.recent:
        lse = None
        out = reference.recent_attention(
            query, key, value, member, recent=config.recent, sinks=config.sinks, offsets=offsets,
            **options,
        )  # fmt: skip
    else:
        inputs = clustered_inputs(member, query, key, value)
        out, lse = reference.clustered_attention(*inputs, member, return_lse=True, **options)
    end = config.probe_end
    if end and query.shape[2] == key.shape[2]:
        own = Membership.identity(config.heads, config.kv_heads, device=DEVICE)
        states = (x[:, :, :end] for x in (query, key, value))
        options["valid"] = None
        out[:, :end] = reference.clustered_attention(*states, own, **options)[0]
    return out[0], None if lse is None else lse[0]


def _loss(config: Config, one: Sequence, member: Membership, scale: float) -> float:
    """What torch's attention loses in this dtype, every head with its representative's Q and K."""
    rep, group = member.representatives[0], member.group_size
    states = (one.query[rep], one.key[rep // group], one.value.repeat_interleave(group, 0))
    mask = reference.visible(
        1, one.query.shape[1], one.key.shape[1], None, one.valid[None], one.query.device
    )[0]
    mask = mask | (torch.arange(mask.shape[-1], device=DEVICE) == 0)  # every query sees a key

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if config.softcap is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        scores = query.to(work) @ key.to(work).mT * scale
        scores = config.softcap * torch.tanh(scores / config.softcap)
        probs = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
        return probs.to(value.dtype) @ value

    exact = run(*(x.double() for x in states))
    return (run(*states).double() - exact).abs().max().item()
