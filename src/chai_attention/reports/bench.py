"""Benchmark results as tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from chai_attention.errors import ChaiError
from chai_attention.reports.drawing import SOFT, Panel, bars, curve, save_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
CLUSTERED = "CHAI"  # the run of ``chai bench model`` that all others are compared with
STEADY = 1.3  # by how much ceilings before and after may differ


def attention_tables(report: Row) -> list[Table]:
    """Return the tables of ``chai bench attention``: the clusters, then every baseline."""
    main = _table(
        f"{machine_name(report)}; {_shape(report)}; {report['layout']}",
        ("case", "dtype"),
        ("k", "time", "rate", "ideal", "of ideal", "baseline", "its time", "speed-up", "ideal"),
    )
    _add_rows(main, report["results"], lambda row: [
        row["dtype"],
        str(row["clusters"]),
        _time(row),
        _rate(row),
        duration(row["ideal_us"]),
        f"{row['of_ideal']:.0%}",
        row["baseline"] or "-",
        duration(row["baseline_us"]),
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        f"{row['ideal_speedup']:.2f}x",
    ])  # fmt: skip
    main.caption = _ceilings(report) + (
        " Time: median ± interquartile range. Ideal: bytes or matrix work over these ceilings; "
        "the last column is the speed-up that it would be." + _unfused_note(report)
    )
    main.caption_justify = "left"
    others = _table("Without clusters", ("case", "dtype", "baseline", "time"), ())
    _add_rows(others, report["baselines"], lambda row: [
        row["dtype"], row["baseline"], _time(row) if "us" in row else row["missing"]
    ])  # fmt: skip
    return [main, others]


def _add_rows(table: Table, rows: Sequence[Row], cells: Callable[[Row], Sequence[str]]) -> None:
    """Add each row's case and cells, with a line behind the last row of a case."""
    for row, following in zip_longest(rows, rows[1:]):
        last = following is None or case_of(following) != case_of(row)
        table.add_row(case_of(row), *cells(row), end_section=last)


def _unfused_note(report: Row) -> str:
    """Name the cases in which attention that is not fused was the fastest without clusters."""
    fused = {(case_of(row), row["dtype"]): row["baseline_us"] for row in report["results"]}
    faster = [
        f"{case_of(row)} {row['dtype']} ({row['baseline']}, {duration(row['us'])})"
        for row in report["baselines"]
        if not row["fused"] and "us" in row and row["us"] < (fused[case_of(row), row["dtype"]] or 0)
    ]
    if not faster:
        return ""
    return (
        " The baseline is the fastest fused one; attention that is not fused was faster in "
        f"{'; '.join(faster)}."
    )


def model_tables(report: Row) -> list[Table]:
    """Return the table of ``chai bench model``."""
    table = _table(
        f"{machine_name(report)}; {report['model']['name']}: {report['model']['layers']} layers, "
        f"{report['model']['heads']} heads x {report['model']['head_dim']}, {report['dtype']}; "
        f"{report['profile']}",
        ("prompt", "run"),
        (
            *("TTFT", "ideal", "unfused", "fused", "TPOT", "ideal", "unfused", "fused"),
            *("K,V", "peak"),
        ),
    )
    _add_rows(table, report["results"], _model_cells)
    table.caption = _ceilings(report) + (
        f" TTFT: a forward over the prompt; TPOT: {report['steps']}. Unfused and fused: "
        "the speed-up over the first and over the faster of the second and third run, in brackets "
        "that at the ideal times, which are weights, K and V once through memory or all matrix "
        "work. K,V: bytes allocated."
    )
    table.caption_justify = "left"
    return [table]


def _model_cells(row: Row) -> list[str]:
    """A run of ``chai bench model``: its times beside ideals and other runs, and its memory."""
    if "missing" in row:
        return [row["run"], row["missing"]]
    cells = [row["run"]]
    for name in ("ttft", "tpot"):
        cells += [duration(row[f"{name}_us"]), duration(row[f"ideal_{name}_us"])]
        unfused, fused = row[f"{name}_vs_unfused"], row[f"{name}_vs_fused"]
        cells.append("-" if unfused is None else f"{unfused:.2f}x")
        ideal = row[f"ideal_{name}_vs_fused"]
        cells.append("-" if fused is None else f"{fused:.2f}x ({ideal:.2f}x)")
    peak = row["peak_bytes"]
    return [*cells, size(row["kv_bytes"]), "-" if peak is None else size(peak)]


def base_tables(report: Row) -> list[Table]:
    """Times of another revision beside these, if there are any (``--base``)."""
    base = report.get("base")
    if base is None:
        return []
    table = _table(
        f"Revision {base['revision'][:12]} beside this code", ("case", "what"),
        ("its time", "this time", "faster"),
    )  # fmt: skip
    for row in base["compared"]:
        name, before, now = row["time"], row["before"], row["now"]
        parts = [str(row[key]) for key in ("run", "dtype") if key in row]
        parts += [f"{row['clusters']} clusters"] if "clusters" in row else []
        parts += [name.removesuffix("_us").upper()] if name != "us" else []
        table.add_row(
            case_of(row), ", ".join(parts), duration(before), duration(now), f"{before / now:.2f}x"
        )
    return [table]


def attention_plot(report: Row, path: Path) -> Path:
    """Draw `attention_panels` into a file.

    Raises:
        ChaiError: no baseline ran, matplotlib is not installed, or the file cannot be written.
    """
    title = f"Speed-up of clustered attention, {_shape(report)}, {machine_name(report)}"
    none = "there is no speed-up to plot: no baseline ran"
    return save_panels(attention_panels(report), path, ChaiError, title, none=none)


def attention_panels(report: Row) -> list[Panel]:
    """Speed-up over the baseline against the number of clusters, a panel per case."""
    rows = [row for row in report["results"] if row["speedup"] is not None]
    top = max((max(row["speedup"], row["ideal_speedup"]) for row in rows), default=1)
    panels = []
    for case, dtype in dict.fromkeys((case_of(row), row["dtype"]) for row in rows):
        part = [row for row in rows if (case_of(row), row["dtype"]) == (case, dtype)]
        part.sort(key=lambda row: row["clusters"])
        title = f"{case}, {dtype}, against {part[0]['baseline']}"
        panels.append(Panel(title, partial(_draw_speed_ups, part, top)))
    return panels


def _draw_speed_ups(rows: Sequence[Row], top: float, axes: Axes) -> None:
    ideal = [(row["clusters"], row["ideal_speedup"], 0.0) for row in rows]
    curve(axes, ideal, "ideal", 2, line="--", tips=[f"ideal {y:.2f}x" for _, y, _ in ideal])
    curve(
        axes,
        [(row["clusters"], row["speedup"], 0.0) for row in rows],
        "measured",
        1,
        tips=[
            f"{row['clusters']} clusters: {duration(row['us'])} against "
            f"{duration(row['baseline_us'])}, {row['speedup']:.2f}x"
            for row in rows
        ],
    )
    axes.axhline(1, color=SOFT, linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set(xlabel="clusters", ylabel="speed-up", ylim=(0, 1.1 * top))


def model_plot(report: Row, path: Path) -> Path:
    """Draw `latency_panels` into a file.

    Raises:
        ChaiError: nothing ran, matplotlib is not installed, or the file cannot be written.
    """
    title = f"{report['model']['name']}, {report['dtype']}, {machine_name(report)}"
    none = "there is nothing to plot: no run fitted the memory"
    return save_panels(latency_panels(report), path, ChaiError, title, 2, none=none)


def latency_panels(report: Row) -> list[Panel]:
    """Time to first token and time per token of every run beside its ideal, per case."""
    names = (("ttft", "time to first token"), ("tpot", "time per token"))
    return [
        _bars(f"{case}: {long}", part, f"{name}_us", duration, f"ideal_{name}_us")
        for case, part in _by_case(report)
        for name, long in names
    ]


def memory_panels(report: Row) -> list[Panel]:
    """Bytes of the K,V cache, and at the peak where it is known, of every run, per case."""
    return [
        _bars(f"{case}: {long}", part, name, size)
        for case, part in _by_case(report)
        for long, name in (("K,V cache", "kv_bytes"), ("peak", "peak_bytes"))
        if all(row[name] is not None for row in part)
    ]


def _by_case(report: Row) -> list[tuple[str, list[Row]]]:
    """The runs that came about, by case."""
    rows = [row for row in report["results"] if "missing" not in row]
    cases = dict.fromkeys(map(case_of, rows))
    return [(case, [row for row in rows if case_of(row) == case]) for case in cases]


def _bars(
    title: str, rows: Sequence[Row], name: str, show: Callable[[Any], str], ideal: str | None = None
) -> Panel:
    ideals = [None if ideal is None else row[ideal] for row in rows]
    texts = [
        show(row[name]) + ("" if best is None else f" (ideal {show(best)})")
        for row, best in zip(rows, ideals, strict=True)
    ]
    draw = partial(
        bars, names=[row["run"] for row in rows], values=[row[name] for row in rows], texts=texts,
        ideals=ideals, main=CLUSTERED,
    )  # fmt: skip
    return Panel(title, draw, (3.4, 0.4 + 0.36 * len(rows)))


def case_of(row: Row) -> str:
    """``decode 16 x 8,192``."""
    kind = f"{row['kind']} " if "kind" in row else ""
    return f"{kind}{row['batch']} x {row['tokens']:,}"


def duration(us: float | None) -> str:
    """Microseconds with a unit that fits."""
    if us is None:
        return "-"
    for factor, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= factor:
            return f"{us / factor:.3g} {unit}" if us < 100 * factor else f"{us / factor:.0f} {unit}"
    return f"{us:.3g} us" if us < 100 else f"{us:.0f} us"


def size(count: int) -> str:
    """Bytes with a unit that fits."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:,} B"


def _time(row: Row) -> str:
    """Median and interquartile range."""
    return f"{duration(row['us'])} ±{row['iqr_us'] / row['us']:.0%}"


def _rate(row: Row) -> str:
    """What was moved in decode, computed in prefill, per second."""
    if row["kind"] == "decode":
        return f"{row['bytes'] / row['us'] / 1e3:,.0f} GB/s"
    return f"{row['flops'] / row['us'] / 1e3:,.0f} GF/s"


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def machine_name(report: Row) -> str:
    """The GPU, or the processor and its threads."""
    machine = report["machine"]
    if machine["device"] == "cuda":
        return str(machine["gpu"])
    return f"{machine['processor']}, {machine['threads']} threads"


def _shape(report: Row) -> str:
    shape = report["shape"]
    groups = "" if shape["kv_heads"] == shape["heads"] else f", {shape['kv_heads']} K/V heads"
    return f"{shape['name']}: {shape['heads']} heads x {shape['head_dim']}{groups}"


def _ceilings(report: Row) -> str:
    """What the machine was measured to do."""
    parts = [
        f"{found['read_gb_s']:,.0f} GB/s, {1e3 * found['matmul_tflop_s']:,.0f} GFLOP/s in {dtype}"
        for dtype, found in report["ceilings"].items()
    ]
    text = f"Ceilings measured in the same run: {'; '.join(parts)}."
    unsteady = unsteadiness(report)
    return f"DO NOT TRUST THESE FIGURES: {unsteady} {text}" if unsteady else text


def unsteadiness(report: Row) -> str:
    """What the machine's ceilings before and after the run say against its figures, if anything."""
    worst = max(report["drift"].values())
    if worst <= STEADY:
        return ""
    return (
        f"the machine was {worst:.1f} times faster at one end of the run than at the other; other "
        "work was going on."
    )
