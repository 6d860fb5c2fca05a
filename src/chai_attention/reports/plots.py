"""Figures of a profile: elbow curves, similarity of heads, what each head does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from chai_attention.errors import ProfileError
from chai_attention.profile import ClusterProfile
from chai_attention.reports import drawing
from chai_attention.reports.drawing import BAR, CARD, IDEAL, MAIN, Panel, curve, matrix_panel
from chai_attention.reports.head_kinds import KINDS, MEANING, head_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROFILE_PLOTS = ("elbow.png", "similarity.png", "heads.png")
KIND_COLORS = dict(zip(KINDS, (MAIN, BAR, IDEAL), strict=True))


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
    curves, maps = [], []
    if profile.error is not None and profile.similarity is not None:
        for layer, (errors, table) in enumerate(
            zip(profile.error, profile.similarity, strict=True)
        ):
            draw = partial(_draw_elbow, errors, len(table), profile.clusters[layer])
            curves.append(Panel(_title(profile, layer), draw, drawing.SMALL))
            maps.append(matrix_panel(f"layer {layer}", table))
    elif kinds is None:
        raise ProfileError("this profile has no error curves to plot: make one with chai calibrate")
    titles = (
        "Clustering error by number of clusters, relative to the fewest; the line marks the choice",
        "Similarity of the heads' attention maps (cosine; dark 0, bright 1), head by head",
        "What each head does with its far keys",
    )
    panels = (curves, maps, [] if kinds is None else [heads_panel(kinds)])
    figures = dict(zip(PROFILE_PLOTS, zip(panels, titles, strict=True), strict=True))
    return drawing.save_figures(figures, folder, ProfileError)


def heads_panel(kinds: Sequence[Sequence[str]]) -> Panel:
    """What every head does with its far keys: a square for every layer (across) and head (down)."""
    layers, heads = len(kinds), len(kinds[0])
    side = min(0.14, 2.9 / layers)
    counts = Counter(chain(*kinds))

    def draw(axes: Axes) -> None:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Rectangle

        squares = [[KINDS.index(kinds[layer][head]) for layer in range(layers)]
                   for head in range(heads)]  # fmt: skip
        drawn = axes.pcolormesh(
            range(-1, layers), range(-1, heads), squares, vmin=0, vmax=len(KINDS) - 1,
            cmap=ListedColormap([KIND_COLORS[kind] for kind in KINDS]), edgecolors=CARD,
            linewidth=0.5,
        )  # fmt: skip
        told = [[f"layer {layer}, head {head}: {kinds[layer][head]}" for layer in range(layers)]
                for head in range(heads)]  # fmt: skip
        drawing.tip(drawn, list(chain(*told)))
        for kind in KINDS:
            label = f"{kind} ({counts[kind]}): {MEANING[kind]}"
            axes.add_patch(Rectangle((0, 0), 0, 0, color=KIND_COLORS[kind], label=label))
        axes.grid(visible=False)
        for set_ticks, count in ((axes.set_xticks, layers), (axes.set_yticks, heads)):
            shown = range(0, count, -(-count // 10))
            set_ticks([number - 0.5 for number in shown], [str(number) for number in shown])
        axes.invert_yaxis()
        axes.set(xlabel="layer", ylabel="head")

    return Panel(
        "What each head does with its far keys", draw, (0.5 + side * layers, 0.5 + side * heads)
    )


def _title(profile: ClusterProfile, layer: int) -> str:
    forget = len(profile.streaming_heads(layer))
    return f"layer {layer}: {profile.clusters[layer]} clusters" + (
        f", {forget} stream" if forget else ""
    )


def _draw_elbow(errors: Sequence[float], heads: int, chosen: int, axes: Axes) -> None:
    """Error against the number of clusters; the chosen number is marked."""
    step = heads // len(errors)
    curve(axes, [(step * i, error, 0.0) for i, error in enumerate(errors, start=1)], "_", 1)
    axes.axvline(chosen, color=IDEAL, linewidth=1)
    axes.set_ylim(0, 1.05)
