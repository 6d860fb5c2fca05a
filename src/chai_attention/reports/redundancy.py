"""A redundancy study as a table and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
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
from chai_attention.reports import drawing
from chai_attention.reports.drawing import BAR, CARD, MAIN, SOFT, Panel, curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AGREEMENT = "agreement (ARI)"
CURVES = 6  # elbow curves in one panel
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
    names = ("correlation", "on first key", "elbow", "clusters", "sizes", "agreement", "kept")
    for name in ("layer", *names):
        table.add_column(name, justify="right", no_wrap=name != "layer")
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
    name = study.model["name"]
    maps = [
        drawing.matrix_panel(f"layer {la.layer}: mean {la.mean_correlation:.2f}", la.correlation)
        for la in study.layers
    ]
    shades = "head by head (dark 0 or less, bright 1)"
    figures: dict[str, tuple[list[Panel], str]] = {
        "correlation.png": (maps, f"{name}: correlation of the heads' attention maps, {shades}"),
        "elbow.png": (elbow_panels(study), f"{name}: k-means inertia by number of clusters"),
        "sizes.png": ([sizes_panel(study)], f"{name}: sizes of the clusters, a box each"),
        "stability.png": (
            stability_panels(study),
            f"{name}: do clusters stay while a request grows?",
        ),
    }
    return drawing.save_figures(figures, folder, RedundancyError)


def correlation_panel(study: Redundancy) -> Panel:
    """Mean correlation of two heads, by layer."""
    curves = {
        "all keys": [la.mean_correlation for la in study.layers],
        "without the first key": [off_diagonal(la.without_first) for la in study.layers],
        "probability on the first key": [la.first_share for la in study.layers],
    }

    def draw(axes: Axes) -> None:
        for style, (label, values) in enumerate(curves.items(), start=1):
            points = [(la.layer, y, 0.0) for la, y in zip(study.layers, values, strict=True)]
            curve(axes, points, label, style, line="--" if style == len(curves) else "-")
        axes.locator_params(axis="x", integer=True)
        lowest = min(0.0, *chain(*curves.values()))
        axes.set(xlabel="layer", ylabel="mean over pairs", ylim=(lowest, 1.02))

    return Panel("Mean correlation of two heads' maps", draw)


def elbow_panels(study: Redundancy) -> list[Panel]:
    """Inertia against the number of clusters, of a few layers each; the elbows are marked."""

    def draw(layers: Sequence[LayerRedundancy], axes: Axes) -> None:
        for style, layer in enumerate(layers, start=1):
            top = layer.inertia[0] or 1.0
            points = [(k, error / top, 0.0) for k, error in enumerate(layer.inertia, start=1)]
            curve(axes, points, "_", style, marked=False)
            told = f"layer {layer.layer}: elbow at {layer.elbow} clusters"
            label = f"layer {layer.layer}: {layer.elbow}"
            curve(axes, [points[layer.elbow - 1]], label, style, line="", tips=[told])
        axes.locator_params(axis="x", integer=True)
        axes.set(xlabel="clusters", ylabel="inertia, share of one cluster's", ylim=(0, 1.05))

    parts = [study.layers[at : at + CURVES] for at in range(0, len(study.layers), CURVES)]
    return [
        Panel(f"layers {part[0].layer} to {part[-1].layer}; the elbow of each",
              partial(draw, part), own_legend=True)
        for part in parts
    ]  # fmt: skip


def sizes_panel(study: Redundancy) -> Panel:
    """A column of boxes for every layer, a box per cluster."""

    def draw(axes: Axes) -> None:
        for place, layer in enumerate(study.layers):
            below = 0
            for rank, count in enumerate(layer.sizes):
                color = (MAIN, BAR)[rank % 2]
                (box,) = axes.bar(place, count, 0.9, below, color=color, edgecolor=CARD)
                drawing.tip(box, [f"{layer.layer}: {count}"])
                below += count
        shown = range(0, len(study.layers), -(-len(study.layers) // 12))
        axes.set_xticks(shown, [str(study.layers[place].layer) for place in shown])
        axes.set(xlabel="layer", ylabel="heads")

    return Panel("Every box is a cluster", draw)


def stability_panels(study: Redundancy) -> list[Panel]:
    """How far memberships of the first tokens agree with later ones; none if none can change."""
    found, lengths = study.stability, study.lengths
    if found is None:
        return []
    single = [la.stability.agreement[0] for la in study.layers if la.stability is not None]
    last = len(lengths) - 1

    def draw(
        label: str, curves: Mapping[str, tuple[int, Sequence[float], Sequence[float]]], axes: Axes
    ) -> None:
        if label == AGREEMENT:
            for thin in single if len(curves) == 1 else ():
                axes.plot(lengths, thin, color=SOFT, linewidth=0.6, alpha=0.5)
            axes.axhline(0, color=SOFT, linewidth=0.8)
        for name, (style, values, errors) in curves.items():
            curve(axes, list(zip(lengths, values, errors, strict=True)), name, style)
        drawing.values_as_ticks(axes, lengths)
        lowest = min(0.0, *chain(*single)) if label == AGREEMENT else 0
        axes.set(xlabel="membership from the first n tokens", ylabel=label, ylim=(lowest, 1.02))

    agreement, errors = found.agreement, found.agreement_error
    return [
        Panel(title, partial(draw, label, curves))
        for title, label, curves in (
            (
                f"with the clusters of the first {lengths[0]} tokens; thin: single layers",
                AGREEMENT,
                {f"first {lengths[0]}": (1, agreement[0], errors[0])},
            ),
            (
                "with the clusters of the whole request, or of all others",
                AGREEMENT,
                {
                    "whole request": (2, agreement[last], errors[last]),
                    "all other requests (static)": (3, found.static, found.static_error),
                },
            ),
            (
                f"share of heads still in their cluster of the first {lengths[0]}",
                "share of heads",
                {"kept": (4, found.kept, found.kept_error)},
            ),
        )
    ]
