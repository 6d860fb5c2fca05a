"""A frontier (perplexity rise against K,V bytes saved) as a table and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from chai_attention.evaluation.points import FrontierError, Point
from chai_attention.reports.drawing import SOFT, Panel, curve, save_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = "paper"
CLEAR = 2.0  # standard errors from which a rise of the paper's recipe can be compared with
SHARES = {"save": "K,V bytes", "removed": "heads"}  # what budgets are shares of
LINEAR_BELOW = 1.0  # percent; the plot's y axis is logarithmic above


def told_apart(points: Sequence[Point]) -> list[Point]:
    """Name points for people: what only shares a name with others says how it differs.

    A file keeps the points of all runs into it. Meanwhile the settings of a recipe may have
    changed, the profile in a file, what budgets are shares of, or the sequences of a text.
    """
    recipes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    texts: dict[tuple[str, int], set[str]] = {}
    for point in points:
        recipes.setdefault(_place(point), []).append(_made_by(point))
        texts.setdefault((point.text, point.context), set()).add(point.digest)
    found = []
    for point in points:
        made, others = _made_by(point), recipes[_place(point)]
        differs = [
            f"{key} {made.get(key, 'not given')}"
            for key in dict.fromkeys(key for other in others for key in other)
            if any(other.get(key) != made.get(key) for other in others)
        ]
        recipe = f"{point.recipe} ({', '.join(differs)})" if differs else point.recipe
        text = point.text
        if len(texts[text, point.context]) > 1:
            text += f" (sequences {point.digest})"
        found.append(replace(point, recipe=recipe, text=text))
    return found


def _place(point: Point) -> tuple[Any, ...]:
    """The curve that a point would be on by its names."""
    return point.recipe, point.text, point.digest, point.context


def _made_by(point: Point) -> dict[str, Any]:
    """What was asked for a point's profile, as words."""
    asked = {} if point.asked is None else {"share of": SHARES[point.asked]}
    settings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in point.settings.items()}
    return {**settings, **asked}


def paper_ratio(point: Point, points: Sequence[Point]) -> float | None:
    """Divide a point's perplexity rise by the paper's at the same K,V bytes saved.

    Where the paper's recipe was not measured at these bytes, its ``log(1 + rise)`` is
    interpolated between the nearest points below and above; nothing is extrapolated.

    Args:
        point: what is compared.
        points: among them the paper's, of which those of the same text and context count.

    Returns:
        The ratio; below 1 is better than the paper. None for the paper itself, where it has no
        points around these bytes, and where its rise is not clear of its own error.
    """
    if point.recipe == PAPER:
        return None
    best: dict[float, Point] = {}  # of several points with the same bytes, the paper's best
    measured_on = (point.text, point.digest, point.context)
    for other in points:
        same = (other.text, other.digest, other.context) == measured_on
        if same and other.recipe == PAPER:
            saved = round(other.saved, 6)
            if saved not in best or other.rise < best[saved].rise:
                best[saved] = other
    saved = round(point.saved, 6)
    below = max((x for x in best if x <= saved), default=None)
    above = min((x for x in best if x >= saved), default=None)
    if below is None or above is None:
        return None
    ends = best[below], best[above]
    if not all(end.rise > CLEAR * end.standard_error for end in ends):
        return None
    share = 0.0 if above == below else (saved - below) / (above - below)
    low, high = (math.log1p(end.rise) for end in ends)
    return point.rise / math.expm1(low + share * (high - low))


def frontier_table(points: Sequence[Point]) -> Table:
    """One row per point: what was asked and removed, bytes saved, and the perplexity rise."""
    shown = told_apart(points)
    several = len({point.text for point in shown}) > 1
    table = Table(box=SIMPLE, caption=_caption(shown), caption_justify="left")
    for name in ("recipe", *(["text"] if several else [])):
        table.add_column(name, overflow="fold")
    headings = ("asked", "context", "heads\nremoved", "K,V\nsaved", "perplexity\nrise")
    for name in (*headings, "/ paper", "made"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, point in enumerate(shown):
        ratio = paper_ratio(points[index], points)
        following = shown[index + 1] if index + 1 < len(shown) else point
        table.add_row(
            point.recipe,
            *([point.text] if several else []),
            "-" if point.budget is None else f"{point.budget:.1%}",
            str(point.context),
            f"{point.removed:.1%}",
            f"{'≥ ' if point.at_least else ''}{point.saved:.1%}",
            _rise(point),
            "-" if ratio is None else f"{ratio:.2f}",
            f"{point.seconds:.0f} s",
            end_section=following.recipe != point.recipe,
        )
    return table


def _rise(point: Point) -> str:
    """Rise and error, with the digits that mean something."""
    digits = 2 if point.rise < 1 else 0
    return f"{point.rise:+.{digits}%} ±{point.standard_error:.{digits}%}"


def _caption(points: Sequence[Point]) -> str:
    """What the numbers are relative to."""
    models = {(p.text, p.context): p for p in points}.values()
    baselines = ", ".join(
        f"{p.baseline:.2f} on {p.windows} sequences of {p.context} tokens of {p.text}"
        for p in models
    )
    asked = {point.asked for point in points if point.asked is not None}
    return (
        f"Perplexity without clusters: {baselines}. "
        + (f"Asked: a share of the {SHARES[asked.pop()]}. " if len(asked) == 1 else "")
        + "± is the standard error, paired by sequences. / paper: the rise divided by that of the "
        "recipe paper at the same K,V bytes saved, interpolated if need be; - where the paper has "
        "no points around these bytes, or none clear of its error. Made: time of calibration."
    )


def frontier_plot(
    models: Mapping[str, Sequence[Point]],
    path: Path,
    title: str = "Perplexity rise against K,V cache saved",
) -> Path:
    """Draw `frontier_panels` into a file: PNG, or SVG by its name.

    Args:
        models: points by the name of their model.
        path: the file; its folder is made if missing.
        title: above all panels.

    Raises:
        FrontierError: no points, or the file cannot be written.
        ChaiError: matplotlib is not installed.
    """
    contexts = len({point.context for points in models.values() for point in points})
    return save_panels(
        frontier_panels(models), path, FrontierError, title, contexts if contexts > 1 else 2,
        none="there are no points to plot",
    )  # fmt: skip


def frontier_panels(models: Mapping[str, Sequence[Point]]) -> list[Panel]:
    """A panel per model, text and context length, with equal axes so that they can be compared."""
    models = {model: told_apart(found) for model, found in models.items()}
    points = [point for found in models.values() for point in found]
    bounds = {point.recipe for point in points if point.at_least}
    labels = {
        point.recipe: point.recipe + (" (saves at least)" if point.recipe in bounds else "")
        for point in points
    }
    reach = [100 * (p.rise + sign * p.standard_error) for p in points for sign in (-1, 1)]
    ticks = axis_ticks(min(reach, default=0), max(reach, default=0))
    most = max((100 * point.saved for point in points), default=0)
    texts = {(model, point.text) for model, found in models.items() for point in found}
    panels = []
    for model, text in dict.fromkeys((m, p.text) for m, found in models.items() for p in found):
        here = [point for point in models[model] if point.text == text]
        for context in sorted({point.context for point in here}):
            names = [model] if len(models) > 1 else []
            names += [f"{context} tokens", *([text] if len(texts) > 1 else [])]
            part = [point for point in here if point.context == context]
            panels.append(Panel(", ".join(names), partial(_draw, part, labels, ticks, most)))
    return panels


def _draw(
    points: Sequence[Point],
    labels: Mapping[str, str],
    ticks: Sequence[float],
    most: float,
    axes: Axes,
) -> None:
    """One curve per recipe, with error bars; the paper's is black and dashed."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    others = [recipe for recipe in labels if recipe != PAPER]
    for recipe, label in labels.items():
        part = sorted((p for p in points if p.recipe == recipe), key=lambda p: (p.saved, p.rise))
        if part:
            curve(
                axes,
                [(100 * p.saved, 100 * p.rise, 100 * p.standard_error) for p in part],
                label,
                0 if recipe == PAPER else 1 + others.index(recipe),
                line="--" if recipe == PAPER else "-",
                tips=[
                    f"{recipe}: {p.rise:+.2%} ±{p.standard_error:.2%} at {p.saved:.1%} saved"
                    for p in part
                ],
            )
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=0.6)
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.set(xlabel="K,V bytes saved, %", ylabel="perplexity rise, %", xlim=(0, 1.05 * most))


def axis_ticks(low: float, high: float) -> list[float]:
    """0, and 1, 2 and 5 times the powers of ten around ``low`` to ``high``, percent."""
    top = max(abs(low), abs(high), 1.0)
    powers = range(math.ceil(math.log10(top)) + 1)
    # a label for every decade is enough on a long axis
    factors = (1, 2, 5) if top <= 1000 else (1,)
    steps = [0.5, *(factor * 10.0**power for power in powers for factor in factors)]
    ticks = [*(-step for step in reversed(steps)), 0.0, *steps]
    # one more at each end, so that the axis ends on a number
    first = max((t for t in ticks if t <= min(low, 0.0)), default=ticks[0])
    last = min((t for t in ticks if t >= max(high, 0.0)), default=ticks[-1])
    return [t for t in ticks if first <= t <= last]
