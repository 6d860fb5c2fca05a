"""A frontier as a table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from chai_attention.evaluation.points import FrontierError, Point
from chai_attention.reports.plots import require_matplotlib, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = "paper"
CLEAR = 2.0  # standard errors from which a rise of the paper's recipe can be compared with
LINEAR_BELOW = 1.0  # percent; the plot's y axis is logarithmic above
COLORS = (
    "#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#00838f", "#8d6e63", "#9e9d24",
)  # fmt: skip
MARKERS = "osD^vP*X"


def paper_ratio(point: Point, points: Sequence[Point], reference: str = PAPER) -> float | None:
    """Divide a point's perplexity rise by the paper's at the same K,V bytes saved.

    Where the paper's recipe was not measured at these bytes, its ``log(1 + rise)`` is
    interpolated between the nearest points below and above; nothing is extrapolated.

    Args:
        point: what is compared.
        points: among them the reference's, of which those of the same text and context count.
        reference: name of the recipe to compare with.

    Returns:
        The ratio; below 1 is better than the paper. None for the paper itself, where it has no
        points around these bytes, and where its rise is not clear of its own error.
    """
    if point.recipe == reference:
        return None
    best: dict[float, Point] = {}  # of several points with the same bytes, the paper's best
    for other in points:
        same = (other.text, other.digest, other.context) == (
            point.text,
            point.digest,
            point.context,
        )
        if same and other.recipe == reference:
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
    several = len({point.text for point in points}) > 1
    table = Table(box=SIMPLE, caption=_caption(points), caption_justify="left")
    for name in ("recipe", *(["text"] if several else [])):
        table.add_column(name, overflow="fold")
    headings = ("asked", "context", "heads\nremoved", "K,V\nsaved", "perplexity\nrise")
    for name in (*headings, "/ paper", "made"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, point in enumerate(points):
        ratio = paper_ratio(point, points)
        following = points[index + 1] if index + 1 < len(points) else point
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
        f"{p.baseline:.2f} on {p.windows} windows of {p.context} tokens of {p.text}" for p in models
    )
    asked = {point.asked for point in points if point.asked is not None}
    of = {"save": "K,V bytes", "removed": "heads"}
    return (
        f"Perplexity without clusters: {baselines}. "
        + (f"Asked: a share of the {of[asked.pop()]}. " if len(asked) == 1 else "")
        + "± is the standard error, paired by windows. / paper: the rise divided by that of the "
        "recipe paper at the same K,V bytes saved, interpolated if need be; - where the paper has "
        "no points around these bytes, or none clear of its error. Made: time of calibration."
    )


def frontier_plot(
    models: Mapping[str, Sequence[Point]],
    path: Path,
    title: str = "Perplexity rise against K,V cache saved",
) -> Path:
    """Draw perplexity rise against K,V bytes saved: a panel per model, text and context length.

    Args:
        models: points by the name of their model.
        path: where the PNG, or by its name the SVG, goes; its folder is made if missing.
        title: above all panels.

    Returns:
        The path.

    Raises:
        FrontierError: no points, or the file cannot be written.
        ChaiError: matplotlib is not installed.
    """
    points = [point for found in models.values() for point in found]
    if not points:
        raise FrontierError("there are no points to plot")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        (model, text, context): [p for p in found if (p.text, p.context) == (text, context)]
        for model, found in models.items()
        for text in dict.fromkeys(point.text for point in found)
        for context in sorted({point.context for point in found})
    }
    texts = len({panel[:2] for panel in panels})
    columns = len(panels) // texts if len(panels) > texts else min(texts, 2)
    rows = math.ceil(len(panels) / columns)
    bounds = {point.recipe for point in points if point.at_least}
    labels = {
        point.recipe: point.recipe + (" (saves at least)" if point.recipe in bounds else "")
        for point in points
    }
    ticks = axis_ticks(
        100 * min(point.rise - point.standard_error for point in points),
        100 * max(point.rise + point.standard_error for point in points),
    )
    figure = Figure(figsize=(4.6 * columns + 2.4, 4.0 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for axes, ((model, text, context), panel) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, panel, labels, ticks)
        named = [f"{context} tokens", *([text] if texts > 1 else [])]
        axes.set_title(", ".join([*([model] if len(models) > 1 else []), *named]), fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("perplexity rise, %")
    for axes in grid[-1]:
        axes.set_xlabel("K,V bytes saved, %")
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    names = [label for label in labels.values() if label in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="outside right upper", frameon=False
    )
    return save_figure(figure, path, FrontierError)


def _draw(
    axes: Axes, panel: Sequence[Point], labels: Mapping[str, str], ticks: Sequence[float]
) -> None:
    """One curve per recipe, with error bars."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    others = [recipe for recipe in labels if recipe != PAPER]
    for recipe, label in labels.items():
        curve = sorted((p for p in panel if p.recipe == recipe), key=lambda p: (p.saved, p.rise))
        if not curve:
            continue
        paper = recipe == PAPER
        number = 0 if paper else others.index(recipe)
        axes.errorbar(
            [100 * p.saved for p in curve],
            [100 * p.rise for p in curve],
            yerr=[100 * p.standard_error for p in curve],
            label=label,
            color="black" if paper else COLORS[number % len(COLORS)],
            linestyle="--" if paper else "-",
            marker="s" if paper else MARKERS[number % len(MARKERS)],
            markersize=4.5,
            linewidth=1.3,
            zorder=3 if paper else 2,
            capsize=2.5,
        )
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=0.6)
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(0, color="#718096", linewidth=0.8)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8, labelleft=True)


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
