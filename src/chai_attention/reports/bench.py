"""Benchmark reports as tables and as plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from chai_attention.errors import ChaiError
from chai_attention.reports.plots import require_matplotlib, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
MEASURED, IDEAL, BASELINE, UNFUSED = "#2b6cb0", "#c05621", "#718096", "#a0aec0"
COLUMNS = 3
STEADY = 1.3  # by how much ceilings before and after may differ


def attention_tables(report: Row) -> list[Table]:
    """Return the tables of ``chai bench attention``: the clusters, then every baseline."""
    rows: Sequence[Row] = report["results"]
    main = _table(
        f"{machine_name(report)}; {_shape(report)}; {report['layout']}",
        ("case", "dtype"),
        (
            "k",
            "time",
            "rate",
            "ideal",
            "of ideal",
            "baseline",
            "its time",
            "speed-up",
            "ideal",
        ),
    )
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or case_of(rows[index + 1]) != case_of(row)
        main.add_row(
            case_of(row),
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
            end_section=last,
        )
    main.caption = _ceilings(report) + (
        " Time: median ± interquartile range. Ideal: bytes or matrix work over these ceilings; "
        "the last column is the speed-up that it would be." + _unfused_note(report)
    )
    main.caption_justify = "left"
    return [main, _baselines(report["baselines"])]


def _baselines(rows: Sequence[Row]) -> Table:
    table = _table("Without clusters", ("case", "dtype", "baseline", "time"), ())
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or case_of(rows[index + 1]) != case_of(row)
        time = _time(row) if "us" in row else row["missing"]
        table.add_row(case_of(row), row["dtype"], row["baseline"], time, end_section=last)
    return table


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
    rows: Sequence[Row] = report["results"]
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or case_of(rows[index + 1]) != case_of(row)
        if "missing" in row:
            table.add_row(case_of(row), row["run"], row["missing"], end_section=last)
            continue
        cells = []
        for name in ("ttft", "tpot"):
            cells += [duration(row[f"{name}_us"]), duration(row[f"ideal_{name}_us"])]
            unfused, fused = row[f"{name}_vs_unfused"], row[f"{name}_vs_fused"]
            cells.append("-" if unfused is None else f"{unfused:.2f}x")
            ideal = row[f"ideal_{name}_vs_fused"]
            cells.append("-" if fused is None else f"{fused:.2f}x ({ideal:.2f}x)")
        peak = row["peak_bytes"]
        table.add_row(
            case_of(row),
            row["run"],
            *cells,
            size(row["kv_bytes"]),
            "-" if peak is None else size(peak),
            end_section=last,
        )
    table.caption = _ceilings(report) + (
        f" TTFT: a forward over the prompt; TPOT: {report['steps']}. Unfused and fused: "
        "the speed-up over the first and over the faster of the second and third run, in brackets "
        "that at the ideal times, which are weights, K and V once through memory or all matrix "
        "work. K,V: bytes allocated."
    )
    table.caption_justify = "left"
    return [table]


def attention_plot(report: Row, path: Path) -> Path:
    """Draw speed-up over the baseline against the number of clusters, per case.

    Raises:
        ChaiError: no baseline ran, matplotlib is not installed, or the file cannot be written.
    """
    rows = [row for row in report["results"] if row["speedup"] is not None]
    if not rows:
        raise ChaiError("there is no speed-up to plot: no baseline ran")
    cases = list(dict.fromkeys((case_of(row), row["dtype"]) for row in rows))

    def draw(axes: Axes, index: int) -> None:
        case, dtype = cases[index]
        part = [row for row in rows if (case_of(row), row["dtype"]) == (case, dtype)]
        part.sort(key=lambda row: row["clusters"])
        counts = [row["clusters"] for row in part]
        ideal = [row["ideal_speedup"] for row in part]
        axes.plot(counts, ideal, "--", color=IDEAL, label="ideal")
        axes.plot(counts, [row["speedup"] for row in part], "o-", color=MEASURED, label="measured")
        axes.axhline(1, color=BASELINE, linewidth=0.8)
        axes.set_title(f"{case}, {dtype}, against {part[0]['baseline']}", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("clusters", fontsize=8)

    title = f"Speed-up of clustered attention, {_shape(report)}, {machine_name(report)}"
    return _panels(len(cases), draw, path, title)


def model_plot(report: Row, path: Path) -> Path:
    """Draw time to first token and time per token of every run beside its ideal, per case.

    Raises:
        ChaiError: nothing ran, matplotlib is not installed, or the file cannot be written.
    """
    rows = [row for row in report["results"] if "missing" not in row]
    if not rows:
        raise ChaiError("there is nothing to plot: no run fitted the memory")
    panels = [
        (case, name) for case in dict.fromkeys(map(case_of, rows)) for name in ("ttft", "tpot")
    ]

    def draw(axes: Axes, index: int) -> None:
        case, name = panels[index]
        part = [row for row in rows if case_of(row) == case]
        names = [row["run"] for row in part]
        colors = [MEASURED if row["run"] == "CHAI" else UNFUSED for row in part]
        axes.bar(names, [row[f"{name}_us"] / 1e3 for row in part], color=colors)
        ideal = [row[f"ideal_{name}_us"] / 1e3 for row in part]
        axes.scatter(names, ideal, marker="_", s=600, color=IDEAL, label="ideal", zorder=3)
        axes.set_title(f"{case}: {name.upper()}, ms", fontsize=8)

    return _panels(
        len(panels),
        draw,
        path,
        f"{report['model']['name']}, {report['dtype']}, {machine_name(report)}",
    )


def _panels(count: int, draw: Any, path: Path, title: str) -> Path:
    """Draw ``count`` panels on one page."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 2.8 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= count:
            axes.set_axis_off()
            continue
        draw(axes, index)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, frameon=False)
    return save_figure(figure, path, ChaiError)


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
    worst = max(report["drift"].values())
    if worst > STEADY:
        text = (
            f"DO NOT TRUST THESE FIGURES: the machine was {worst:.1f} times faster at one end of "
            f"the run than at the other; other work was going on. {text}"
        )
    return text
