"""Estimates of serving as a text table, and as what `json` takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from chai_attention.cli.tables import render
from chai_attention.integrations.vllm.estimate import Estimate

CONTEXTS = (2048, 8192, 32768)
BATCH = 16


def serving_table(found: Estimate) -> str:
    """Capacity and the best that decode can gain, per context length."""
    full, kept = found.token_bytes
    lines = [
        f"memory for K and V: about {found.budget.cache / 1e9:.1f} GB of "
        f"{found.budget.total / 1e9:.1f} GB (weights {found.budget.weights / 1e9:.1f} GB)",
        f"K,V bytes per token: {full:,}, with clusters {kept:,} ({1 - kept / full:.1%} saved)",
        f"tokens that fit: {found.full.tokens:,}, with clusters {found.clustered.tokens:,} "
        f"({found.capacity_gain:.2f}x)",
    ]
    if found.window_bytes:
        lines.append(
            f"recent window: {found.window_bytes:,} bytes for each of {found.requests:,} requests "
            "(--max-num-seqs), taken at the start"
        )
    table = Table(title="expected gain")
    for name in ("context", "requests that fit", "with clusters", f"decode at batch {BATCH}"):
        table.add_column(name, justify="right")
    for context in CONTEXTS:
        counts = [held.tokens // context for held in (found.full, found.clustered)]
        gain = f"at most {found.decode_gain(BATCH, context):.2f}x"
        table.add_row(f"{context:,}", *(f"{count:,}" for count in counts), gain)
    return "\n".join([*lines, render(table)])


def serving_record(found: Estimate) -> dict[str, Any]:
    """The estimate in bytes, pages and tokens, with the best that can be gained."""
    return {
        **asdict(found),
        "capacity_gain": found.capacity_gain,
        "decode_gain_at_most": [
            {"batch": BATCH, "context": context, "gain": found.decode_gain(BATCH, context)}
            for context in CONTEXTS
        ],
    }
