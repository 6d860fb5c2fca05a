"""PNG plots of a profile."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_attention.errors import ChaiError, ProfileError
from chai_attention.profile import ClusterProfile
from chai_attention.reports.head_kinds import FORGET, KEEP, KINDS, SHARE, count_kinds, head_kinds
from chai_attention.whole_files import require_folder, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 6
PROFILE_PLOTS = ("elbow.png", "similarity.png", "heads.png")
KIND_COLORS = {KEEP: "#2b6cb0", SHARE: "#c3cfdd", FORGET: "#c05621"}


def profile_plots(profile: ClusterProfile, folder: Path) -> list[Path]:
    """Draw the elbow curve and the similarity of heads of every layer, and what its heads do.

    Args:
        profile: one that calibration wrote.
        folder: where the files go; made if missing.

    Returns:
        Paths of ``elbow.png`` and ``similarity.png``, of a profile with curves, and of
        ``heads.png``, of one that says what each head does.

    Raises:
        ProfileError: the profile has neither, or the folder cannot be written.
        ChaiError: matplotlib is not installed.
    """
    kinds = head_kinds(profile)
    curves = profile.error is not None and profile.similarity is not None
    if not curves and kinds is None:
        raise ProfileError("this profile has no error curves to plot: make one with chai calibrate")
    require_matplotlib()
    require_folder(folder, ProfileError, PROFILE_PLOTS, "plots")
    paths = [_elbows(profile, folder), _similarities(profile, folder)] if curves else []
    return paths if kinds is None else [*paths, _heads(kinds, folder)]


def _heads(kinds: Sequence[Sequence[str]], folder: Path) -> Path:
    """What every head does with its far keys: a square per layer and head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers, heads = len(kinds), len(kinds[0])
    figure = Figure(figsize=(max(4.5, 0.16 * heads + 1), 0.16 * layers + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    numbers = [[KINDS.index(kind) for kind in row] for row in kinds]
    colors = ListedColormap([KIND_COLORS[kind] for kind in KINDS])
    axes.imshow(numbers, vmin=0, vmax=len(KINDS) - 1, cmap=colors, aspect="equal")
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(labelsize=6)
    # white lines between the squares
    axes.set_xticks([head - 0.5 for head in range(1, heads)], minor=True)
    axes.set_yticks([layer - 0.5 for layer in range(1, layers)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    counts = count_kinds(kinds)
    patches = [Patch(color=KIND_COLORS[kind], label=f"{kind} ({counts[kind]})") for kind in KINDS]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(KINDS), fontsize=7)
    figure.suptitle("What each head does with its far keys", fontsize=10)
    return save_figure(figure, folder / "heads.png", ProfileError)


def _elbows(profile: ClusterProfile, folder: Path) -> Path:
    """Error against the number of clusters; the chosen number is marked."""
    assert profile.error is not None
    assert profile.similarity is not None

    def draw(axes: Axes, layer: int) -> None:
        curve, chosen = profile.error[layer], profile.clusters[layer]  # type: ignore[index]
        step = len(profile.similarity[layer]) // len(curve)  # type: ignore[index]
        counts = [step * (i + 1) for i in range(len(curve))]
        axes.plot(counts, curve, marker="o", markersize=2.5, linewidth=1, color="#2b6cb0")
        axes.axvline(chosen, color="#c05621", linewidth=1)
        forget = len(profile.streaming_heads(layer))
        rest = f", {forget} stream" if forget else ""
        axes.set_title(f"layer {layer}: {chosen} clusters{rest}", fontsize=8)
        axes.set_ylim(0, 1.05)

    return small_multiples(
        len(profile.clusters),
        draw,
        folder / "elbow.png",
        "Clustering error by number of clusters, relative to the fewest; the line marks the choice",
    )


def _similarities(profile: ClusterProfile, folder: Path) -> Path:
    """Cosine similarity of the heads' attention maps."""

    def draw(axes: Axes, layer: int) -> None:
        axes.imshow(profile.similarity[layer], vmin=0, vmax=1, cmap="viridis")  # type: ignore[index]
        axes.set_title(f"layer {layer}", fontsize=8)

    return small_multiples(
        len(profile.clusters),
        draw,
        folder / "similarity.png",
        "Similarity of the heads' attention maps (cosine; dark 0, bright 1), head by head",
    )


def small_multiples(count: int, draw: Any, path: Path, title: str) -> Path:
    """Draw ``count`` small plots on one page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(1.9 * columns + 0.4, 1.7 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= count:
            axes.set_axis_off()
            continue
        draw(axes, index)
        axes.tick_params(labelsize=6)
    return save_figure(figure, path, ProfileError)


def save_figure(figure: Figure, path: Path, error: type[ChaiError], dpi: int = 130) -> Path:
    """Write a figure as PNG, or as SVG by its name; its folder is made if missing.

    Raises:
        ChaiError: ``error``, if the file cannot be written.
    """
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    texts = [figure.texts, *(legend.get_texts() for legend in legends if legend is not None)]
    # they hold names of models and files, in which a dollar begins no formula
    for text in (*chain(*texts), *(axes.title for axes in figure.axes)):
        text.set_parse_math(False)
    from matplotlib import rc_context

    content, svg = BytesIO(), path.suffix == ".svg"
    # the same figure is the same file, with text that can be read and searched
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "chai"}):
        figure.savefig(content, dpi=dpi, format="svg" if svg else "png",
                       metadata={"Date": None} if svg else None)  # fmt: skip
    write_whole(path, content.getvalue(), error, make_folder=True)
    return path


def require_matplotlib() -> None:
    """Raise `ChaiError` where there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ChaiError("plots need matplotlib: pip install 'chai-attention[plots]'")
