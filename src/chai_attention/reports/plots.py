"""PNG plots of a profile."""

from __future__ import annotations

import importlib.util
import math
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_attention.errors import ChaiError, ProfileError
from chai_attention.profile import ClusterProfile
from chai_attention.whole_files import require_folder, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 6
PROFILE_PLOTS = ("elbow.png", "similarity.png")


def profile_plots(profile: ClusterProfile, folder: Path) -> list[Path]:
    """Draw the elbow curve and the similarity of heads of every layer.

    Args:
        profile: one that calibration wrote.
        folder: where the files go; made if missing.

    Returns:
        Paths of ``elbow.png`` and ``similarity.png``.

    Raises:
        ProfileError: the profile has no curves, or the folder cannot be written.
        ChaiError: matplotlib is not installed.
    """
    if profile.error is None or profile.similarity is None:
        raise ProfileError("this profile has no error curves to plot: make one with chai calibrate")
    require_matplotlib()
    require_folder(folder, ProfileError, PROFILE_PLOTS, "plots")
    return [_elbows(profile, folder), _similarities(profile, folder)]


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
        axes.set_title(f"layer {layer}: {chosen} clusters", fontsize=8)
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
    """Write a figure as PNG, as `write_whole` writes; its folder is made if missing.

    Raises:
        ChaiError: ``error``, if the file cannot be written.
    """
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    texts = [figure.texts, *(legend.get_texts() for legend in legends if legend is not None)]
    # they hold names of models and files, in which a dollar begins no formula
    for text in (*chain(*texts), *(axes.title for axes in figure.axes)):
        text.set_parse_math(False)
    content = BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_whole(path, content.getvalue(), error, make_folder=True)
    return path


def require_matplotlib() -> None:
    """Raise `ChaiError` where there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ChaiError("plots need matplotlib: pip install 'chai-attention[plots]'")
