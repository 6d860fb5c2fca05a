"""Tables of what `serving.py` measured, with what could have been at best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parts import load_parts
from serving_ideal import H100, Ideal, Rates
from serving_kinds import KINDS, SHAPES, TINY, stock_of
from serving_loads import SHARED, Case, requests_of, scale_of

Rows = dict[str, tuple[float, float, bool]]  # what: measured, ideal, whether more is better


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of a folder, by kind."""
    found = {}
    for path in folder.glob("serving-*.json"):
        result = load_parts(path)
        if "kind" not in result:
            raise SystemExit(f"{path} was written by an earlier version of this script")
        found[result["kind"]] = result
    return {name: found[name] for name in KINDS if name in found}


def rows_of(name: str, result: dict[str, Any], room: float, rates: Rates) -> Rows:
    """What was measured of a kind, beside the ideal.

    Args:
        name: the kind's.
        result: of its file.
        room: bytes of the K,V cache of vLLM as it is, of all ranks.
        rates: of the GPU, for the ideal.
    """
    kind = KINDS[name]
    tiny = result["about"]["tiny"]
    scale = scale_of(kind.model, tiny)
    ideal = Ideal((TINY if tiny else SHAPES)[kind.model], kind, ranks_of(result), rates)
    rows: Rows = {}
    if "capacity" in result:
        best = room / ideal.cache_bytes(scale.context)
        rows["capacity, requests"] = (result["capacity"]["requests"], best, True)
    cases = {case.name: case for case in scale.cases}
    for case_name, times in result["cases"].items():
        case: Case = cases[case_name]
        if "tpot_ms" in times:
            step = ideal.step([case.prompt + case.new // 2] * case.batch)
            rows[f"time per token {case.name}, ms"] = (times["tpot_ms"], step * 1e3, False)
        first = ideal.prompt(case.prompt - case.cached, case.cached) * case.batch
        if case.turn:  # so few tokens that reading takes longer
            first = max(first, ideal.step([case.prompt] * case.batch))
        rows[f"first token {case.name}, ms"] = (times["ttft_ms"], first * 1e3, False)
    for load, found in result["throughput"].items():
        requests = requests_of(load, scale)
        if load == SHARED:
            requests = [(length + scale.system, output) for length, output in requests]
        written = sum(output for _, output in requests)
        limits = (room, scale.most, scale.budget)
        best = written / ideal.load(requests, *limits)
        if load == SHARED:
            row = f"{load}, without hits, output tokens/s"
            rows[row] = (found["uncached_tokens_s"], best, True)
            best = written / ideal.load(requests, *limits, scale.system)
        rows[f"{load}, output tokens/s"] = (found["output_tokens_s"], best, True)
    return rows


def table(folder: Path) -> str:
    """All results of a folder in Markdown, with gains on vLLM as it is, measured and ideal."""
    # an engine that has not started yet knows no capacity
    found = {name: each for name, each in results(folder).items() if "capacity" in each}
    lines = []
    for stock in (name for name in KINDS if KINDS[name].own is None):
        kinds = [name for name in found if stock_of(name) == stock]
        if not kinds:
            continue
        base = found.get(stock, {})
        room = float(_room(base or found[kinds[0]]))
        rates, where = rates_of(base)
        each = {name: rows_of(name, found[name], room, rates) for name in kinds}
        named = [row for rows in each.values() for row in rows]
        lines += [
            f"Ideals at {rates.bytes_s / 1e12:.2f} TB/s and {rates.operations_s / 1e12:.0f} "
            f"TFLOP/s, {where}:",
            "",
            f"| {stock} | {' | '.join(kinds)} |",
            "|---" * (len(kinds) + 1) + "|",
            *(
                f"| {row} | "
                + " | ".join(
                    _cell(rows.get(row), each.get(stock, {}).get(row)) for rows in each.values()
                )
                + " |"
                for row in dict.fromkeys(named)
            ),
            *_hits(found, kinds),
            "",
        ]
    return "\n".join(lines)


def rates_of(stock: dict[str, Any]) -> tuple[Rates, str]:
    """The rates at which both sides of a comparison are ideal, and where they are from.

    Args:
        stock: the result of vLLM as it is; empty where there is none.
    """
    if "rates" not in stock:
        return H100, "about an H100's, as the baseline's file has none"
    return Rates(**stock["rates"]), "measured in the baseline's engine"


def ranks_of(result: dict[str, Any]) -> int:
    """GPUs of the engine."""
    return int(result["about"]["options"].get("tensor_parallel_size", 1))


def _room(result: dict[str, Any]) -> int:
    """Bytes of an engine's K,V cache, which every rank has a part of."""
    held = result["capacity"]
    return ranks_of(result) * int(held["blocks"]) * int(held["block_bytes"])


def _cell(
    measured: tuple[float, float, bool] | None, base: tuple[float, float, bool] | None
) -> str:
    """What was measured, what that gains, and what could be gained."""
    if measured is None:
        return "-"
    value, best, more = measured
    text = f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    if base is None or base is measured:
        return text
    gain, ideal = (a / b if more else b / a for a, b in ((value, base[0]), (best, base[1])))
    return f"{text} (**{gain:.3f}x**, ideal {ideal:.2f}x)"


def _hits(found: dict[str, dict[str, Any]], kinds: list[str]) -> list[str]:
    """Rows about the shared prompt that have no ideal."""
    rows = []
    for key, text in (("cached", "cached tokens"), ("equal", "tokens equal to those without hits")):
        values = [found[name]["throughput"].get(SHARED, {}).get(key) for name in kinds]
        if any(value is not None for value in values):
            cells = ("-" if value is None else f"{value:,}" for value in values)
            rows.append(f"| {SHARED}, {text} | {' | '.join(cells)} |")
    return rows


__all__ = ["results", "rows_of", "table"]
