"""Page sections of ``chai frontier`` and ``chai eval``: quality against memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from chai_attention.evaluation.points import Point
from chai_attention.evaluation.table import LEGEND, engine_of, rich_tables
from chai_attention.evaluation.tasks import facts_and_length
from chai_attention.reports.answer import eval_answer, frontier_answer
from chai_attention.reports.drawing import SOFT, Panel, curve, values_as_ticks
from chai_attention.reports.frontier import (
    LINEAR_BELOW,
    frontier_panels,
    frontier_table,
    told_apart,
)
from chai_attention.reports.sections import Charts, Grid, Section, grid_of, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONTIER_OF = "Quality against memory: "
TESTED_ON = "tested on"


def frontier_section(about: Mapping[str, Any], points: Sequence[Point], source: str) -> Section:
    """Perplexity rise against K,V bytes saved: a chart per text and context length."""
    model = str(about.get("model", "a model"))
    named = told_apart(points)
    baselines = {(p.text, p.context): p for p in named}.values()
    workload = "; ".join(
        f"{p.windows} sequences of {p.context:,} tokens of {p.text} "
        f"(perplexity without clusters {p.baseline:.2f})"
        for p in baselines
    )
    summary = [
        "Lower and further right is better. 0 is the model without clusters; bars are one standard "
        f"error, paired by sequences; the axis is logarithmic above {LINEAR_BELOW:g}%.",
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
            *((str(name), words(value)) for name, value in about.items() if value is not None),
            (TESTED_ON, workload),
            *([] if about.get("hardware") else [("hardware", "not recorded in this file")]),
        ],
        answer=frontier_answer(named),
        summary=summary,
        charts=[
            Charts("Perplexity rise against K,V bytes saved", frontier_panels({model: points}))
        ],
        tables=[grid_of(frontier_table(points), "All points")],
        points=points,
    )


def eval_section(table: Mapping[str, Any], source: str) -> Section:
    """The table of ``chai eval`` with accuracy and likelihood against K,V bytes kept."""
    run, rows = table["run"], table["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    drawn = [
        _against_kept(table, "acc", "accuracy minus full model, points", 100.0),
        _against_kept(table, "nll", "NLL minus full model, nats", 1.0),
    ]
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
            ("engine", engine_of(run)),
            ("versions", versions),
            ("tasks", items),
            ("seed", str(run["seed"])),
        ],
        answer=eval_answer(table),
        summary=[
            f"Every row is compared with {names[0]}, the full model, item by item; bars are one "
            "standard error of that difference.",
        ],
        charts=[*_recall_charts(table), *_kept_charts(rows, drawn)],
        tables=[
            *(grid_of(part) for part in tables),
            Grid(
                "Methods",
                ["", "where it is defined"],
                [[name, str(row["source"])] for name, row in zip(names, rows, strict=True)],
            ),
        ],
    )


def _recall_charts(table: Mapping[str, Any]) -> list[Charts]:
    """A panel for every number of facts, a curve for every comparator; none without recall."""
    tasks = {task: found for task in table["tasks"] if (found := facts_and_length(task))}
    if not tasks:
        return []

    def draw(facts: int, axes: Axes) -> None:
        for style, row in enumerate(table["rows"]):
            points = sorted(
                (length, 100 * row["tasks"][task]["acc"], 100 * row["tasks"][task]["acc_se"])
                for task, (count, length) in tasks.items()
                if count == facts
            )
            curve(axes, points, str(row["comparator"]), style)
        values_as_ticks(axes, [length for _, length in tasks.values()])
        axes.set(xlabel="tokens", ylabel="exact answers, %", ylim=(0, 105))

    return [
        Charts(
            "Recall of facts hidden in text",
            [
                Panel(f"{facts} fact{'s' * (facts > 1)} in the text", partial(draw, facts))
                for facts in dict.fromkeys(facts for facts, _ in tasks.values())
            ],
            "Higher is better. Bars are one standard error over questions; the tables have the "
            "paired differences, and the K,V bytes kept at each length.",
        )
    ]


def _kept_charts(rows: Sequence[Mapping[str, Any]], drawn: Sequence[Panel | None]) -> list[Charts]:
    panels = [panel for panel in drawn if panel is not None]
    note = (
        "Upper left is better in accuracy, lower left in NLL (negative log-likelihood of "
        f"the right answer). Bytes kept: at {rows[0]['kv_length']:.0f} tokens, the mean "
        "length of the tasks' requests."
    )
    return [Charts("Quality against K,V bytes kept", panels, note)] if panels else []


def _against_kept(table: Mapping[str, Any], measure: str, label: str, scale: float) -> Panel | None:
    """Difference to the full model against K,V bytes kept, over the average or the first task.

    None without one that is no recall, which has charts of its own.
    """
    others = [task for task in table["tasks"] if facts_and_length(task) is None]
    if not others:
        return None
    averaged = table["rows"][0]["average"] is not None
    cells = [
        row["tasks"][others[0]] if row["average"] is None else row["average"]
        for row in table["rows"]
    ]
    if any(cell[f"{measure}_diff"] is None for cell in cells):
        return None

    def draw(axes: Axes) -> None:
        for style, (row, cell) in enumerate(zip(table["rows"], cells, strict=True)):
            difference, error = cell[f"{measure}_diff"], cell[f"{measure}_diff_se"]
            point = (100 * row["kv_share"], scale * difference, scale * error)
            curve(axes, [point], str(row["comparator"]), style, line="")
        axes.axhline(0, color=SOFT, linewidth=0.8)
        axes.set(xlabel="K,V bytes kept, %", ylabel=label)

    of = f"average of {', '.join(table['average_of'])}" if averaged else str(others[0])
    return Panel(f"{label.split(' minus ')[0]}, {of}", draw)
