"""Page sections of ``chai bench attention`` and ``chai bench model``: speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chai_attention.reports.answer import attention_answer, model_answer
from chai_attention.reports.bench import (
    CLUSTERED,
    attention_panels,
    attention_tables,
    latency_panels,
    machine_name,
    memory_panels,
    model_tables,
    unsteadiness,
)
from chai_attention.reports.sections import Charts, Section, grid_of, machine_facts

Row = Mapping[str, Any]


def attention_section(report: Row, source: str) -> Section:
    """Speed-up over the fastest fused baseline beside the ideal, per case."""
    shape, panels = report["shape"], attention_panels(report)
    rows: Sequence[Row] = [row for row in report["results"] if row["speedup"] is not None]
    return Section(
        kind="attention speed",
        title=f"Attention alone: {shape['name']}, {report['layout']}",
        source=source,
        facts=[
            *machine_facts(report["machine"]),
            ("ceilings", _ceilings(report)),
            (
                "workload",
                f"one layer, {shape['heads']} heads of {shape['head_dim']}, "
                f"{shape['kv_heads']} K/V heads; {report['layout']}",
            ),
        ],
        answer=attention_answer(
            [row for row in rows if row["clusters"] < shape["heads"]], machine_name(report)
        ),
        summary=[
            *_warning(report),
            "Speed-up over the fastest attention without clusters: on a GPU of what is fused and "
            "installed, on a CPU of everything, CHAI's own code included. "
            "The ideal divides the bytes that have to be read (decode) or the matrix work "
            "(prefill); the line at 1 is the baseline.",
        ],
        charts=[Charts("Speed-up beside the ideal", panels)] if panels else [],
        tables=list(
            map(grid_of, attention_tables(report), ("Clustered attention", "Without clusters"))
        ),
    )


def model_section(report: Row, source: str) -> Section:
    """Time to first token, time per token and memory of every run, ideals beside them."""
    rows: Sequence[Row] = [row for row in report["results"] if "missing" not in row]
    model = report["model"]
    latency = Charts(
        "Latency beside the ideal",
        latency_panels(report),
        "The mark is the ideal: weights, K and V once through memory, or all matrix work, at "
        "the measured ceilings.",
    )
    held = Charts("Memory", memory_panels(report), "Bytes allocated, not computed.")
    return Section(
        kind="model speed",
        title=f"Whole model: {model['name']}",
        source=source,
        facts=[
            *machine_facts(report["machine"]),
            ("ceilings", _ceilings(report)),
            (
                "model",
                f"{model['name']}: {model['layers']} layers, {model['heads']} heads of "
                f"{model['head_dim']}, {model['kv_heads']} K/V heads, {report['dtype']}",
            ),
            ("profile", str(report["profile"])),
            ("clusters per layer", ", ".join(map(str, report["clusters"]))),
        ],
        answer=model_answer([row for row in rows if row["run"] == CLUSTERED], machine_name(report)),
        summary=_warning(report),
        charts=[group for group in (latency, held) if group.panels],
        tables=[grid_of(table, "All figures") for table in model_tables(report)],
    )


def _ceilings(report: Row) -> str:
    return "; ".join(
        f"{found['read_gb_s']:,.0f} GB/s read, {1e3 * found['matmul_tflop_s']:,.0f} GFLOP/s in "
        f"{dtype}, measured in the same run"
        for dtype, found in report["ceilings"].items()
    )


def _warning(report: Row) -> list[str]:
    unsteady = unsteadiness(report)
    return [f"Do not trust these figures: {unsteady}"] if unsteady else []
