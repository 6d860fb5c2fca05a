"""Tables of what `large_models.py` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chai_attention.benchmarking.model import FUSED, UNFUSED
from large_models_kinds import KINDS, PUBLISHED

PAPER = "1.73x"  # CHAI's gain in time to first token at 2,048 tokens, over unfused attention


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: hardware, times of all kinds of attention, and the cost of evidence."""
    parts = [_missing(result) for result in found if "missing" in result.get("machine", {})]
    parts += [*(_speed(result) for result in found), _evidence(found)]
    return "\n".join(part for part in parts if part)


def _missing(result: dict[str, Any]) -> str:
    return f"{_title(result)}: {result['machine']['missing']}.\n"


def _hardware(result: dict[str, Any]) -> str:
    """Devices, dtype's ceilings and software of a result."""
    machine = result.get("machine", {})
    where = machine.get("gpu", machine.get("processor", "unknown"))
    used = len(machine.get("devices", [])) or 1
    name = f"{used} x {where}" if "gpu" in machine else str(where)
    rates = result.get("ceilings")
    ceilings = f", {rates['gb_s']:,.0f} GB/s, {rates['tflop_s']:,.0f} TFLOP/s" if rates else ""
    return f"{name}{ceilings}, torch {machine.get('torch', '?')}"


def _title(result: dict[str, Any]) -> str:
    about = result["about"]
    layers = "" if about["layers"] is None else f", {about['layers']} layers"
    return f"{about['model']}{', tiny' if about['tiny'] else ''}{layers}"


def _speed(result: dict[str, Any]) -> str:
    """Times of one model."""
    rows = {kind: result[f"speed {kind}"] for kind in KINDS if f"speed {kind}" in result}
    if not rows:
        return ""
    about = result["about"]
    steps = next((row["steps"] for row in rows.values() if "steps" in row), "not measured")
    lines = [
        f"### {_title(result)}: first token of {about['batch']} x {about['prompt']}, and the next",
        "",
        f"{_hardware(result)}. Time per token: {steps}.",
        "",
        "| attention | first token, ms | ideal | over unfused | over fused | per token, ms "
        "| ideal | over unfused | over fused | K,V saved | most memory, GB a device |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        if "missing" in row:
            lines.append(f"| {kind} | {row['missing']} | | | | | | | | | |")
            continue
        cells = [kind]
        for name in ("ttft", "tpot"):
            cells += [f"{row[f'{name}_us'] / 1e3:,.1f}", f"{row[f'ideal_{name}_us'] / 1e3:,.1f}"]
            for other in (UNFUSED, FUSED):
                cells.append(_gain(rows.get(other), row, f"{name}_us", kind in (other, UNFUSED)))
        saved = 1 - row["kv_bytes"] / row["full_kv_bytes"] if row["full_kv_bytes"] else 0.0
        cells += [f"{saved:.1%}", _memory(row)]
        lines.append(f"| {' | '.join(cells)} |")
    if PUBLISHED in rows:
        lines += ["", f"The paper's headline: {PAPER} over unfused attention, first token."]
    return "\n".join(lines) + "\n"


def _gain(other: dict[str, Any] | None, row: dict[str, Any], name: str, itself: bool) -> str:
    if itself or other is None or "missing" in other:
        return ""
    return f"{other[name] / row[name]:.3f}x"


def _memory(row: dict[str, Any]) -> str:
    peaks = row.get("peak_bytes_of", {})
    return " + ".join(f"{peak / 1e9:,.1f}" for peak in peaks.values()) or "-"


def _evidence(found: Sequence[dict[str, Any]]) -> str:
    """Seconds and memory of calibration by gradients."""
    rows = []
    for result in found:
        evidence = result.get("evidence") or {}
        for name, seen in evidence.get("passes", {}).items():
            whole = seen["windows"] == seen["of"]
            took = f"{seen['seconds']:,.1f}" if whole else f"stopped after {seen['seconds']:,.1f}"
            window = "" if seen["window_s"] is None else f"{seen['window_s']:.3f}"
            rows.append(
                f"| {_title(result)} | {name} | {seen['windows']} of {seen['of']} x "
                f"{evidence['length']} | {took} | {window} | {_memory(evidence)} |"
            )
    if not rows:
        return ""
    windows = next(
        result["evidence"]["recents"] for result in found if "recents" in result.get("evidence", {})
    )
    return "\n".join([
        "### Evidence of calibration by gradients",
        "",
        f"{_hardware(found[0])}. Exact windows told together: {', '.join(map(str, windows))}.",
        "",
        "| model | pass | windows | seconds | a window, first batches left out | most memory, GB a"
        " device |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip
