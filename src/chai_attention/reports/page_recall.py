"""Charts of recall: how many answers are exact, by the length of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chai_attention.evaluation.tasks import facts_and_length
from chai_attention.reports.sections import Charts, Panel, legend_of
from chai_attention.reports.svg import Series, line_chart, linear_axis, log_axis


def recall_charts(table: Mapping[str, Any]) -> list[Charts]:
    """A panel for every number of facts, a curve for every comparator; none without recall."""
    tasks = {task: found for task in table["tasks"] if (found := facts_and_length(task))}
    if not tasks:
        return []
    panels, drawn = [], []
    x = log_axis("tokens", [length for _, length in tasks.values()])
    y = linear_axis("exact answers, %", [0.0, 100.0])
    for facts in dict.fromkeys(facts for facts, _ in tasks.values()):
        series = []
        for style, row in enumerate(table["rows"]):
            points = sorted(
                (length, 100 * row["tasks"][task]["acc"], 100 * row["tasks"][task]["acc_se"])
                for task, (count, length) in tasks.items()
                if count == facts
            )
            series.append(Series(str(row["comparator"]), points, style=style))
        title = f"{facts} fact{'s' * (facts > 1)} in the text"
        panels.append(Panel(title, line_chart(title, x, y, series)))
        drawn += series
    return [
        Charts(
            "Recall of facts hidden in text",
            panels,
            legend_of(drawn),
            "Higher is better. Bars are one standard error over questions; the tables have the "
            "paired differences, and the K,V bytes kept at each length.",
        )
    ]
