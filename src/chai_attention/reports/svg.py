"""Charts as SVG text: axes, series with error bars, stacks. Colours come from the page's CSS.

Every chart is drawn for a column of a phone and scales with its width; text is real text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 40
SHAPES = 6  # kinds of markers
COLORS = 10  # classes c0 to c9 of the page

Transform = Callable[[float], float]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with its unit.
        ticks: (value, text), ascending; the first and last may lie inside the range.
        low: where it begins.
        high: where it ends.
        transform: increasing; values are spaced by it.
    """

    label: str
    ticks: Sequence[tuple[float, str]]
    low: float
    high: float
    transform: Transform = float

    def place(self, value: float, length: float) -> float:
        """Distance of a value from the axis's beginning, clipped to the axis."""
        low, high = self.transform(self.low), self.transform(self.high)
        share = (self.transform(value) - low) / (high - low or 1.0)
        return min(1.0, max(0.0, share)) * length


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: for the legend and for tooltips.
        points: (x, y, error of y).
        style: number of its colour and marker.
        dashed: drawn dashed, such as an ideal or a reference.
        joined: with a line between the points.
        marked: with a marker at every point.
        faint: thin and grey, without markers.
        labels: a text for each point, shown on pointing at it; none takes the values.
    """

    name: str
    points: Sequence[tuple[float, float, float]]
    style: int = 0
    dashed: bool = False
    joined: bool = True
    marked: bool = True
    faint: bool = False
    labels: Sequence[str] = ()


def linear_axis(label: str, values: Sequence[float], *, zero: bool = True, count: int = 5) -> Axis:
    """An axis around values with round ticks.

    Args:
        label: of the axis.
        values: what has to fit; not empty.
        zero: begin (or end) at 0.
        count: about how many ticks.
    """
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = low - 0.5 * (not zero), high + 1.0
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [(i * step, f"{i * step:,.6g}") for i in range(first, last + 1)]
    return Axis(label, ticks, ticks[0][0], ticks[-1][0])


def log_axis(label: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis with a tick at every value that is there."""
    shown = sorted(set(values))
    return Axis(label, [(v, f"{v:,g}") for v in shown], shown[0], shown[-1] or 1, math.log)


def line_chart(
    title: str, x: Axis, y: Axis, series: Sequence[Series], *, marks: Sequence[float] = ()
) -> Markup:
    """Draw series over two axes.

    Args:
        title: above the chart; with the names of the series it is read out instead of it.
        x: horizontal axis.
        y: vertical axis.
        series: drawn in order.
        marks: heights of lines across, such as a baseline.
    """
    parts = [*_frame(x, y), *(_level(y, value) for value in marks)]
    for one in series:
        parts += _curve(x, y, one)
    names = ", ".join(one.name for one in series if not one.faint)
    return _svg(title, f"{title}. {y.label} against {x.label}. {names}", parts)


def stack_chart(
    title: str, x_label: str, y_label: str, names: Sequence[str], stacks: Sequence[Sequence[int]]
) -> Markup:
    """Draw a column of boxes for every name, their heights the numbers of its stack."""
    y = linear_axis(y_label, [sum(stack) for stack in stacks])
    step = (WIDTH - LEFT - RIGHT) / max(1, len(names))
    every = math.ceil(len(names) / 12)
    shown = [(i + 0.5, name) for i, name in enumerate(names) if i % every == 0]
    x = Axis(x_label, shown, 0, len(names))
    parts = _frame(x, y)
    for index, stack in enumerate(stacks):
        below = 0
        for rank, count in enumerate(stack):
            top = _down(y, below + count)
            parts.append(
                f'<rect class="box b{rank % 2}" x="{LEFT + index * step + 1:.1f}" y="{top:.1f}" '
                f'width="{max(1.0, step - 2):.1f}" height="{_down(y, below) - top:.1f}">'
                f"<title>{escape(names[index])}: {count}</title></rect>"
            )
            below += count
    return _svg(title, f"{title}. {y_label} by {x_label}", parts)


def swatch(series: Series) -> Markup:
    """The line and marker of a series, for a legend."""
    dash = " dashed" if series.dashed else ""
    line = f'<path class="line c{_color(series)}{dash}" d="M1 7H27"/>' if series.joined else ""
    return Markup(
        f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true">{line}'
        f'<path class="mark c{_color(series)}" d="{_marker(series.style, 14, 7)}"/></svg>'
    )


def _svg(title: str, description: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(description)}">{"".join(parts)}</svg>'
    )


def _frame(x: Axis, y: Axis) -> list[str]:
    """Ticks, grid and labels."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<text class="label" x="2" y="13">{escape(y.label)}</text>',
        f'<text class="label" x="{right}" y="{HEIGHT - 6}" text-anchor="end">'
        f"{escape(x.label)}</text>",
    ]
    for value, text in y.ticks:
        height = _down(y, value)
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{right}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{height + 3.5:.1f}" text-anchor="end">'
            f"{escape(text)}</text>"
        )
    last = -math.inf
    for value, text in x.ticks:
        across = _across(x, value)
        parts.append(f'<path class="grid" d="M{across:.1f} {TOP}V{bottom}"/>')
        width = 6 * len(text)
        if across - width / 2 > last:  # texts that would overlap the one before are left out
            last = across + width / 2 + 3
            parts.append(
                f'<text class="tick" x="{across:.1f}" y="{bottom + 14}" text-anchor="middle">'
                f"{escape(text)}</text>"
            )
    return parts


def _curve(x: Axis, y: Axis, series: Series) -> list[str]:
    places = [(_across(x, a), _down(y, b)) for a, b, _ in series.points]
    color = "faint" if series.faint else f"c{_color(series)}"
    parts = []
    if series.joined and len(places) > 1:
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        dash = " dashed" if series.dashed else ""
        parts.append(f'<path class="line {color}{dash}" d="M{path}"/>')
    if series.faint or not series.marked:
        return parts
    for index, ((value, height, error), (a, b)) in enumerate(
        zip(series.points, places, strict=True)
    ):
        if error > 0:
            low, high = _down(y, height - error), _down(y, height + error)
            parts.append(
                f'<path class="error {color}" d="M{a:.1f} {low:.1f}V{high:.1f}'
                f'M{a - 3:.1f} {low:.1f}h6M{a - 3:.1f} {high:.1f}h6"/>'
            )
        text = (
            series.labels[index]
            if series.labels
            else f"{series.name}: {height:.4g}" + (f" ±{error:.2g}" if error else "")
            + f" at {value:.4g}"
        )  # fmt: skip
        parts.append(
            f'<path class="mark {color}" d="{_marker(series.style, a, b)}">'
            f"<title>{escape(text)}</title></path>"
        )
    return parts


def _level(y: Axis, value: float) -> str:
    return f'<path class="level" d="M{LEFT} {_down(y, value):.1f}H{WIDTH - RIGHT}"/>'


def _across(x: Axis, value: float) -> float:
    return LEFT + x.place(value, WIDTH - LEFT - RIGHT)


def _down(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - y.place(value, HEIGHT - TOP - BOTTOM)


def _color(series: Series) -> int:
    return series.style % COLORS


def _marker(style: int, x: float, y: float) -> str:
    """The path of a marker around a place."""
    kind = style % SHAPES
    if kind == 0:
        return f"M{x - 3.5:.1f} {y:.1f}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z"
    corners = (
        ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        ((0, -4.2), (4.2, 0), (0, 4.2), (-4.2, 0)),
        ((0, -4), (4, 3.2), (-4, 3.2)),
        ((0, 4), (4, -3.2), (-4, -3.2)),
        ((-1.4, -4), (1.4, -4), (1.4, -1.4), (4, -1.4), (4, 1.4), (1.4, 1.4), (1.4, 4),
         (-1.4, 4), (-1.4, 1.4), (-4, 1.4), (-4, -1.4), (-1.4, -1.4)),
    )[kind - 1]  # fmt: skip
    return "M" + "L".join(f"{x + a:.1f} {y + b:.1f}" for a, b in corners) + "Z"
