"""A redundancy study as a table and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from chai_attention.evaluation.redundancy_files import (
    LayerRedundancy,
    Redundancy,
    RedundancyError,
    off_diagonal,
)
from chai_attention.reports.plots import require_matplotlib, save_figure, small_multiples
from chai_attention.whole_files import require_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REDUNDANCY_PLOTS = ("correlation.png", "elbow.png", "sizes.png", "stability.png")
COLOR, ACCENT = "#2b6cb0", "#c05621"
MOST_SIZES = 6  # cluster sizes that a line of text names


def redundancy_table(study: Redundancy) -> Table:
    """One row per layer."""
    first, last = study.lengths[0], study.lengths[-1]
    table = Table(
        title=f"{study.model['name']}: {study.text['requests']} requests of {last} tokens",
        box=SIMPLE,
        caption="Correlation: mean over pairs of heads, in brackets without the first key. "
        f"Agreement (ARI) of the memberships from the first {first} and from all {last} tokens of "
        "a request, ± standard error over requests; kept: share of heads in the same cluster.",
        caption_justify="left",
    )
    table.add_column("layer", justify="right")
    for name in ("correlation", "on first key", "elbow", "clusters", "sizes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("agreement", justify="right", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    for layer in study.layers:
        found = layer.stability
        table.add_row(
            str(layer.layer),
            f"{layer.mean_correlation:.2f} ({off_diagonal(layer.without_first):.2f})",
            f"{layer.first_share:.0%}",
            str(layer.elbow),
            str(layer.clusters),
            sizes_text(layer),
            "-"
            if found is None
            else f"{found.agreement[0][-1]:.2f} ±{found.agreement_error[0][-1]:.2f}",
            "-" if found is None else f"{found.kept[-1]:.0%}",
        )
    return table


def sizes_text(layer: LayerRedundancy) -> str:
    """``5 2 1 1``; the tail of many single heads is counted."""
    sizes = layer.sizes
    if len(sizes) <= MOST_SIZES:
        return " ".join(map(str, sizes))
    return f"{' '.join(map(str, sizes[:MOST_SIZES]))} + {len(sizes) - MOST_SIZES}"


def redundancy_plots(study: Redundancy, folder: Path) -> list[Path]:
    """Draw correlations, elbow curves, cluster sizes and stability.

    Returns:
        Paths of ``correlation.png``, ``elbow.png``, ``sizes.png`` and ``stability.png``, the last
        only if any membership can change.

    Raises:
        RedundancyError: the folder cannot be written.
        ChaiError: matplotlib is not installed.
    """
    require_matplotlib()
    require_folder(folder, RedundancyError, REDUNDANCY_PLOTS, "plots")
    paths = [_correlations(study, folder), _elbows(study, folder), _sizes(study, folder)]
    return [*paths, *([_stability(study, folder)] if study.stability else [])]


def _correlations(study: Redundancy, folder: Path) -> Path:
    def draw(axes: Axes, index: int) -> None:
        layer = study.layers[index]
        axes.imshow(layer.correlation, vmin=0, vmax=1, cmap="viridis")
        axes.set_title(f"layer {layer.layer}: mean {layer.mean_correlation:.2f}", fontsize=8)

    return small_multiples(
        len(study.layers),
        draw,
        folder / "correlation.png",
        f"{study.model['name']}: correlation of the heads' attention maps, head by head "
        "(dark 0 or less, bright 1)",
    )


def _elbows(study: Redundancy, folder: Path) -> Path:
    def draw(axes: Axes, index: int) -> None:
        layer = study.layers[index]
        top = layer.inertia[0] or 1.0
        counts = range(1, len(layer.inertia) + 1)
        curve = [error / top for error in layer.inertia]
        axes.plot(counts, curve, "o-", markersize=2.5, linewidth=1, color=COLOR)
        axes.axvline(layer.elbow, color=ACCENT, linewidth=1)
        axes.set_title(f"layer {layer.layer}: elbow {layer.elbow}", fontsize=8)
        axes.set_ylim(0, 1.05)

    return small_multiples(
        len(study.layers),
        draw,
        folder / "elbow.png",
        f"{study.model['name']}: k-means inertia by number of clusters, relative to one cluster",
    )


def _sizes(study: Redundancy, folder: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [str(layer.layer) for layer in study.layers]
    bottom = [0] * len(names)
    for rank in range(study.model["heads"]):
        height = [layer.sizes[rank] if rank < len(layer.sizes) else 0 for layer in study.layers]
        axes.bar(
            names, height, bottom=bottom, color=("#2b6cb0", "#90cdf4")[rank % 2], edgecolor="white"
        )
        bottom = [low + more for low, more in zip(bottom, height, strict=True)]
    axes.set_xlabel("layer")
    axes.set_ylabel("heads")
    axes.set_title(f"{study.model['name']}: sizes of the clusters, a box each", fontsize=10)
    axes.tick_params(labelsize=7)
    return save_figure(figure, folder / "sizes.png", RedundancyError, dpi=110)


def _stability(study: Redundancy, folder: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    assert study.stability is not None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    lengths, found = study.lengths, study.stability
    for layer in study.layers:
        if layer.stability is not None:
            left.plot(lengths, layer.stability.agreement[0], color="#a0aec0", linewidth=0.7)
    for axes, curves in (
        (left, [("all layers", found.agreement[0], found.agreement_error[0])]),
        (
            right,
            [
                ("whole request", found.agreement[-1], found.agreement_error[-1]),
                ("other requests (static)", found.static, found.static_error),
            ],
        ),
    ):
        for name, mean, error in curves:
            axes.errorbar(lengths, mean, error, label=name, marker="o", markersize=3, linewidth=1.3)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([str(n) for n in lengths])
        axes.set_xlabel("membership from the first n tokens")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    left.set_ylabel("agreement (adjusted Rand index)")
    left.set_title(f"with the first {lengths[0]} tokens; thin: single layers", fontsize=9)
    right.set_title("with that of the whole request, or of other requests", fontsize=9)
    figure.suptitle(f"{study.model['name']}: do clusters stay while a request grows?", fontsize=10)
    return save_figure(figure, folder / "stability.png", RedundancyError, dpi=110)
