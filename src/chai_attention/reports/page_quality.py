"""Sections of a page about quality: a frontier, and a table of tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from chai_attention.evaluation.points import Point
from chai_attention.evaluation.table import LEGEND, rich_tables
from chai_attention.evaluation.tasks import facts_and_length
from chai_attention.reports.answer import eval_answer, frontier_answer
from chai_attention.reports.frontier import LINEAR_BELOW, PAPER, axis_ticks, frontier_table
from chai_attention.reports.page_recall import recall_charts
from chai_attention.reports.sections import (
    Charts,
    Grid,
    Panel,
    Section,
    grid_of,
    legend_of,
)
from chai_attention.reports.svg import Axis, Series, line_chart, linear_axis

FRONTIER_OF = "Quality against memory: "


def frontier_section(about: Mapping[str, Any], points: Sequence[Point], source: str) -> Section:
    """Perplexity rise against K,V bytes saved: a chart per text and context length."""
    recipes = list(dict.fromkeys(point.recipe for point in points))
    others = [recipe for recipe in recipes if recipe != PAPER]
    shown: dict[tuple[str, int], list[Series]] = {}
    for point in points:
        shown.setdefault((point.text, point.context), [])
    for (text, context), series in shown.items():
        for recipe in recipes:
            part = sorted(
                (p for p in points if (p.recipe, p.text, p.context) == (recipe, text, context)),
                key=lambda p: (p.saved, p.rise),
            )
            if part:
                series.append(_recipe_series(part, 0 if recipe == PAPER else
                                             1 + others.index(recipe)))  # fmt: skip
    # one pair of axes for all charts, so that they can be compared
    x = linear_axis("K,V bytes saved, %", [100 * p.saved for p in points])
    ticks = axis_ticks(
        100 * min(p.rise - p.standard_error for p in points),
        100 * max(p.rise + p.standard_error for p in points),
    )
    y = Axis("perplexity rise, %", [(t, f"{t:g}") for t in ticks], ticks[0], ticks[-1], _symlog)
    panels = []
    for (text, context), series in shown.items():
        title = f"{context:,} tokens of {text}"
        panels.append(Panel(title, line_chart(title, x, y, series, marks=[0.0])))
    model = str(about.get("model", "a model"))
    baselines = {(p.text, p.context): p for p in points}.values()
    workload = "; ".join(
        f"{p.windows} windows of {p.context:,} tokens of {p.text} "
        f"(perplexity without clusters {p.baseline:.2f})"
        for p in baselines
    )
    summary = [
        "Lower and further right is better. 0 is the model without clusters; bars are one standard "
        f"error, paired by windows; the axis is logarithmic above {LINEAR_BELOW:g}%.",
    ]
    if any(point.at_least for point in points):
        summary.append(
            "Where every request chooses its own K heads, the bytes saved are a lower bound (≥)."
        )
    return Section(
        kind="quality frontier",
        title=f"{FRONTIER_OF}{model}",
        source=source,
        facts=[
            *((str(name), _words(value)) for name, value in about.items() if value is not None),
            ("tested on", workload),
            *([] if about.get("hardware") else [("hardware", "not recorded in this file")]),
        ],
        answer=frontier_answer(points),
        summary=summary,
        charts=[
            Charts(
                "Perplexity rise against K,V bytes saved",
                panels,
                legend_of([one for series in shown.values() for one in series]),
            )
        ],
        tables=[grid_of(frontier_table(points), "All points")],
        points=points,
    )


def eval_section(table: Mapping[str, Any], source: str) -> Section:
    """The table of ``chai eval`` with accuracy and likelihood against K,V bytes kept."""
    run, rows = table["run"], table["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    found = [
        _against_kept(table, "acc", "accuracy minus full model, points", 100.0),
        _against_kept(table, "nll", "NLL minus full model, nats", 1.0),
    ]
    drawn = [chart for chart in found if chart is not None]
    first = rows[0]["tasks"]
    items = ", ".join(f"{name} ({first[name]['items']:,} items)" for name in table["tasks"])
    names = [str(row["comparator"]) for row in rows]
    tables = rich_tables(table)
    tables[-1].caption = LEGEND
    return Section(
        kind="tasks",
        title=f"Tasks: {run['model']}",
        source=source,
        facts=[
            ("model", f"{run['model']}, weights {str(run['weights'])[:12]}"),
            ("device", f"{run['device']}, {run['dtype']}, batch size {run['batch_size']}"),
            ("versions", versions),
            ("tasks", items),
            ("seed", str(run["seed"])),
        ],
        answer=eval_answer(table),
        summary=[
            f"Every row is compared with {names[0]}, the full model, item by item; bars are one "
            "standard error of that difference.",
        ],
        charts=[
            *recall_charts(table),
            *_kept_charts(rows, drawn),
        ],
        tables=[
            *(grid_of(part) for part in tables),
            Grid(
                "Methods",
                ["", "where it is defined"],
                [[name, str(row["source"])] for name, row in zip(names, rows, strict=True)],
            ),
        ],
    )


def _kept_charts(
    rows: Sequence[Mapping[str, Any]], drawn: Sequence[tuple[Panel, list[Series]]]
) -> list[Charts]:
    if not drawn:
        return []
    return [
        Charts(
            "Quality against K,V bytes kept",
            [panel for panel, _ in drawn],
            legend_of(drawn[0][1]),
            "Upper left is better in accuracy, lower left in NLL (negative log-likelihood of "
            f"the right answer). Bytes kept: at {rows[0]['kv_length']:.0f} tokens, the mean "
            "length of the tasks' requests.",
        )
    ]


def _against_kept(
    table: Mapping[str, Any], measure: str, label: str, scale: float
) -> tuple[Panel, list[Series]] | None:
    """Difference to the full model against K,V bytes kept, over the average or the first task.

    None without one that is no recall, which has charts of its own.
    """
    others = [task for task in table["tasks"] if facts_and_length(task) is None]
    if not others:
        return None
    cells = []
    for row in table["rows"]:
        cell = row["average"] if row["average"] is not None else row["tasks"][others[0]]
        if cell[f"{measure}_diff"] is None:
            return None
        cells.append(cell)
    of = (
        f"average of {', '.join(table['average_of'])}"
        if table["rows"][0]["average"] is not None
        else str(others[0])
    )
    series = [
        Series(
            name=str(row["comparator"]),
            points=[
                (
                    100 * row["kv_share"],
                    scale * cell[f"{measure}_diff"],
                    scale * cell[f"{measure}_diff_se"],
                )
            ],
            style=index,
            joined=False,
        )
        for index, (row, cell) in enumerate(zip(table["rows"], cells, strict=True))
    ]
    ends = [
        value + sign * error for one in series for _, value, error in one.points for sign in (-1, 1)
    ]
    x = linear_axis("K,V bytes kept, %", [*(one.points[0][0] for one in series), 100.0], zero=False)
    title = f"{label.split(' minus ')[0]}, {of}"
    chart = line_chart(title, x, linear_axis(label, ends), series, marks=[0.0])
    return Panel(title, chart), series


def _recipe_series(part: Sequence[Point], style: int) -> Series:
    bound = " (saves at least)" if any(point.at_least for point in part) else ""
    return Series(
        name=part[0].recipe + bound,
        points=[(100 * p.saved, 100 * p.rise, 100 * p.standard_error) for p in part],
        style=style,
        dashed=part[0].recipe == PAPER,
        labels=[
            f"{p.recipe}: {p.rise:+.2%} ±{p.standard_error:.2%} at {p.saved:.1%} saved"
            for p in part
        ],
    )


def _symlog(value: float) -> float:
    """Linear up to `LINEAR_BELOW`, logarithmic above."""
    size = abs(value) / LINEAR_BELOW
    scaled = 0.6 * size if size <= 1 else 0.6 + math.log10(size)
    return math.copysign(scaled, value)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
