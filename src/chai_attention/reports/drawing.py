"""Figures by matplotlib, by the same code for files (PNG, SVG) and for the page with its themes.

A `Panel` is one pair of axes. A page shows panels one by one, so that they fit a phone; a file has
all of them in a grid.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from chai_attention.atomic_write import require_folder, write_whole
from chai_attention.errors import ChaiError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID, CARD, BAR = "#1b1f24", "#57606a", "#e3e7ec", "#f6f7f9", "#8b95a1"
COLORS = (
    INK, "#1f63b8", "#b34700", "#1a7f37", "#6b3fb0", "#b0246d", "#00737f", "#7a6a00", "#cf222e",
    "#7d5a3c",
)  # fmt: skip
MAIN, IDEAL = COLORS[1], COLORS[2]
_SHAPES = "osD^vP"
MARKERS = {"": "━", **dict(zip(f"{_SHAPES}|", "●■◆▲▼✚❘", strict=True))}  # and in a legend
# the page's CSS has these colours for light, dark and print
_VARIABLES = {
    INK: "ink", SOFT: "soft", GRID: "grid", CARD: "card", BAR: "bar",
    **{color: f"c{index}" for index, color in enumerate(COLORS) if index},
}  # fmt: skip
_STYLE = {
    "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT,
    "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": GRID, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1.3, "lines.markersize": 4.5, "errorbar.capsize": 2.5,
    # the same figure is the same file, with text that can be read, searched and selected
    "svg.fonttype": "none", "svg.hashsalt": "chai",
}  # fmt: skip


SMALL = (1.9, 1.7)  # inches of a panel of which a figure has one per layer


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        draw: draws into the axes; labels of what it draws are the legend.
        size: width and height in inches.
        own_legend: the legend is this panel's, not the whole figure's.
    """

    title: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (3.4, 2.4)
    own_legend: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a page's legend: text in the colour of a curve, with its marker."""

    name: str
    color: str
    mark: str


def curve(
    axes: Axes,
    points: Sequence[tuple[float, float, float]],
    label: str,
    style: int = 0,
    *,
    line: str = "-",
    marked: bool = True,
    tips: Sequence[str] = (),
) -> None:
    """Draw one curve.

    Args:
        axes: where.
        points: (x, y, standard error of y).
        label: for the legend; one that begins with "_" is left out.
        style: number of its colour and marker.
        line: as matplotlib has them: "-", "--", or "" for points only.
        marked: with a marker at every point.
        tips: a text for every point, which a page shows as its tooltip; none takes the
            values.
    """
    x, y, errors = zip(*points, strict=True) if points else ((), (), ())
    drawn = axes.errorbar(
        x, y, yerr=errors if any(errors) else None, label=label, linestyle=line,
        color=COLORS[style % len(COLORS)], zorder=3,
        marker=_SHAPES[style % len(_SHAPES)] if marked else "",
    )  # fmt: skip
    told = tips or [
        f"{label}: {b:.4g}" + (f" ±{e:.2g}" if e else "") + f" at {a:.4g}" for a, b, e in points
    ]
    if marked:
        tip(drawn[0], told)


def bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], texts: Sequence[str],
    ideals: Sequence[float | None], main: str,
) -> None:  # fmt: skip
    """Draw a bar for every name from above, its text inside, and a mark where the ideal is.

    The bar named ``main`` stands out.
    """
    places = range(len(names))
    colors = [MAIN if name == main else BAR for name in names]
    axes.barh(places, values, color=colors, height=0.35)
    for place, name, text in zip(places, names, texts, strict=True):
        axes.text(0, place - 0.28, f"{name}: {text}", va="bottom")
    marks = {place: ideal for ideal, place in zip(ideals, places, strict=True) if ideal}
    if marks:
        axes.plot([*marks.values()], [*marks], "|", color=IDEAL, label="ideal", markersize=14,
                  markeredgewidth=2)  # fmt: skip
    axes.set_ylim(len(names) - 0.6, -0.9)
    axes.set_xlim(0, 1.02 * max([*values, *(ideal or 0 for ideal in ideals)]) or 1)
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)


def values_as_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Make x logarithmic with a tick at every value."""
    from matplotlib.ticker import FixedLocator, NullLocator

    shown = sorted(set(values))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{value:,g}" for value in shown])


def matrix_panel(title: str, matrix: Sequence[Sequence[float]]) -> Panel:
    """A small panel of a matrix of heads, dark at 0 or less and bright at 1."""

    def draw(axes: Axes) -> None:
        axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        axes.grid(visible=False)

    return Panel(title, draw, SMALL)


def tip(artist: Any, texts: Sequence[str]) -> None:
    """Give each mark of an artist a text, which `panel_svg` turns into a tooltip."""
    artist.set_gid(json.dumps(list(texts)))


def panel_svg(panel: Panel) -> tuple[Markup, list[Key]]:
    """Draw a panel for a page: SVG in the colours of its theme, and the keys of its legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _drawing(**{"svg.hashsalt": panel.title}):
        figure = Figure(figsize=panel.size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        panel.draw(axes)
        keys = [_key(handle, label) for handle, label in _labelled(axes).items()]
        content = BytesIO()
        _plain_text(figure)
        figure.savefig(content, format="svg", transparent=True)
    names = ", ".join(key.name for key in keys)
    said = f"{panel.title}. {axes.get_ylabel()} against {axes.get_xlabel()}. {names}"
    return _inline(content.getvalue().decode(), said), keys


def save_figures(
    figures: Mapping[str, tuple[Sequence[Panel], str]], folder: Path, error: type[ChaiError]
) -> list[Path]:
    """Write a file for each figure that has panels: panels and title, by the name of the file.

    Raises:
        ChaiError: ``error`` if the folder cannot be written; matplotlib is not installed.
    """
    require_matplotlib()
    require_folder(folder, error, [*figures], "plots")
    return [
        save_panels(panels, folder / name, error, title, 6 if panels[0].size == SMALL else 3)
        for name, (panels, title) in figures.items()
        if panels
    ]


def save_panels(
    panels: Sequence[Panel], path: Path, error: type[ChaiError], title: str, columns: int = 3,
    *, none: str = "there is nothing to plot",
) -> Path:  # fmt: skip
    """Draw panels in a grid and write them as PNG, or as SVG by the file's name.

    Raises:
        ChaiError: ``error`` if the file cannot be written, or there are no panels, which ``none``
            explains; matplotlib is not installed.
    """
    if not panels:
        raise error(none)
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = (max(panel.size[i] for panel in panels) for i in (0, 1))
    with _drawing():
        figure = Figure(figsize=(columns * width + 0.4, rows * height + 0.8), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=10)
        grid = figure.subplots(rows, columns, squeeze=False)
        legend: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel.draw(axes)
            axes.set_title(panel.title)
            if panel.own_legend:
                axes.legend(frameon=False)
            else:
                legend |= {label: handle for handle, label in _labelled(axes).items()}
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        if legend:
            figure.legend([*legend.values()], [*legend], loc="outside lower center",
                          ncols=max(1, min(len(legend), 2 * columns)), frameon=False)  # fmt: skip
        content, svg = BytesIO(), path.suffix == ".svg"
        _plain_text(figure)
        figure.savefig(content, dpi=130, format="svg" if svg else "png",
                       metadata={"Date": None} if svg else None)  # fmt: skip
    write_whole(path, content.getvalue(), error, make_folder=True)
    return path


def require_matplotlib() -> None:
    """Raise `ChaiError` where there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ChaiError("plots need matplotlib: pip install 'chai-attention[plots]'")


def _drawing(**more: Any) -> AbstractContextManager[None]:
    """Draw in our style, whatever the user's."""
    from matplotlib import style

    return style.context(["default", {**_STYLE, **more}])


def _labelled(axes: Axes) -> dict[Any, str]:
    """What has a label, by its handle."""
    return dict(zip(*axes.get_legend_handles_labels(), strict=True))


def _plain_text(figure: Figure) -> None:
    """Texts hold names of models and files, in which a dollar begins no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def _key(handle: Any, name: str) -> Key:
    """The look of what is drawn, of a curve, points or a patch."""
    from matplotlib.colors import to_hex

    line = handle[0] if isinstance(handle, tuple) else handle
    if hasattr(line, "get_marker"):
        color, mark = line.get_color(), MARKERS[line.get_marker()]
        dash = {"--": "╌", "-": "━"}.get(line.get_linestyle(), "")
        mark = dash if mark == dash else dash + mark
    else:
        color, mark = line.get_facecolor(), "■"
        color = color[0] if getattr(color, "ndim", 1) == 2 else color
    return Key(name, _VARIABLES[to_hex(color)], mark)


def _inline(text: str, said: str) -> Markup:
    """An SVG file as a part of an HTML page."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    root = ET.fromstring(text)
    for element in root.iter():
        found = element.attrib.get("id", "")
        if found.startswith("["):
            marks = [part for part in element.iter() if part.tag == "use"] or [
                part for part in element.iter() if part.tag == "path"
            ]
            for mark, told in zip(marks, json.loads(found), strict=False):
                ET.SubElement(mark, "title").text = told
        if element.tag == "g":  # nothing refers to them, and two figures have the same
            element.attrib.pop("id", None)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"class": "chart", "role": "img", "aria-label": said}
    return Markup(ET.tostring(root, encoding="unicode"))
