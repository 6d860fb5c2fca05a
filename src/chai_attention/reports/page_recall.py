"""Charts of recall: how many answers are exact, by the length of the text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from chai_attention.evaluation.tasks import facts_and_length
from chai_attention.reports.drawing import Panel, curve, values_as_ticks
from chai_attention.reports.sections import Charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def recall_charts(table: Mapping[str, Any]) -> list[Charts]:
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
        axes.set_ylim(0, 105)
        axes.set_xlabel("tokens")
        axes.set_ylabel("exact answers, %")

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
