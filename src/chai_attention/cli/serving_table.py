"""Estimates of serving, as a text table and as a dictionary for ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from chai_attention.cli.tables import render
from chai_attention.integrations.vllm.estimate import Blocks, Estimate

CONTEXTS = (2048, 8192, 32768)
BATCH = 16


def serving_table(
    found: Estimate, contexts: Sequence[int] = CONTEXTS, requests: int | None = None
) -> str:
    """Capacity and the best that decode can gain.

    Args:
        found: the estimate.
        contexts: tokens of a request, a row for each.
        requests: to be served at a time; None: gains are told for 16, and not whether they fit.
    """
    full, kept = found.token_bytes
    ranks = found.savings.ranks
    lines = [
        f"memory for K and V: about {found.budget.cache / 1e9:.1f} GB of "
        f"{found.budget.total / 1e9:.1f} GB (weights {found.budget.weights / 1e9:.1f} GB)",
        f"K,V bytes per token: {full:,}, with clusters {kept:,} ({1 - kept / full:.1%} saved)",
        *([found.savings.line] if ranks > 1 else []),
    ]
    if found.clustered.per.local_page is not None:
        lines += _window(found.clustered.per)
    if found.budget.tables:
        lines.append(f"tables of online memberships: {found.budget.tables / 1e9:.2f} GB")
    context = contexts[len(contexts) // 2]
    named = f" in requests of {context:,}" if found.clustered.per.local_page else ""
    lines.append(
        f"tokens that fit{named}: {found.full.tokens(context):,}, with clusters "
        f"{found.clustered.tokens(context):,} ({found.capacity_gain(context):.2f}x)"
    )
    table = Table(title="expected gain")
    batch = requests or BATCH
    for name in ("context", "requests that fit", "with clusters", f"decode at batch {batch}"):
        table.add_column(name, justify="right")
    for context in contexts:
        counts = [held.requests(context) for held in (found.full, found.clustered)]
        gain = f"at most {found.decode_gain(batch, context):.2f}x"
        table.add_row(f"{context:,}", *(f"{count:,}" for count in counts), gain)
        if requests is not None:
            lines.append(_verdict(requests, context, counts))
    return "\n".join([*lines, render(table)])


def _window(per: Blocks) -> list[str]:
    """What the exact recent window takes."""
    held = per.local_pages(10**9)
    return [
        f"exact window of {per.recent} + {per.sinks} tokens: {held} blocks "
        f"({held * per.block_bytes:,} bytes) a request at most, as much as "
        f"{held * per.page:,} tokens take",
        f"pages of {per.page} tokens, and of {per.local_page} for the window, which leave "
        f"{per.wasted:.1%} of "
        f"{'their' if per.local_bytes <= per.far_bytes else 'the other'} blocks empty",
    ]


def _verdict(requests: int, context: int, counts: Sequence[int]) -> str:
    """Whether so many requests fit."""
    full, kept = ("fit" if count >= requests else f"do not fit ({count:,} do)" for count in counts)
    return f"{requests:,} requests of {context:,} tokens: {full}, with clusters they {kept}"


def serving_record(
    found: Estimate, contexts: Sequence[int] = CONTEXTS, requests: int | None = None
) -> dict[str, Any]:
    """The estimate in bytes, blocks and tokens, with the best that can be gained."""
    batch = requests or BATCH
    record = asdict(found)
    for name, held in (("full", found.full), ("clustered", found.clustered)):
        record[name]["per"] |= {"block_bytes": held.per.block_bytes, "wasted": held.per.wasted}
    return {
        **record,
        "ranks": found.savings.ranks,
        "lost_by_ranks": found.savings.lost,
        "contexts": [
            {
                "context": context,
                "tokens": [held.tokens(context) for held in (found.full, found.clustered)],
                "requests": [held.requests(context) for held in (found.full, found.clustered)],
                "local_pages": found.clustered.per.local_pages(context),
                "capacity_gain": found.capacity_gain(context),
                "batch": batch,
                "decode_gain_at_most": found.decode_gain(batch, context),
            }
            for context in contexts
        ],
    }
