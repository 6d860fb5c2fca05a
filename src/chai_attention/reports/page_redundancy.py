"""The section of a page about a redundancy study, and the data of its explorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chai_attention.evaluation.redundancy_files import (
    LayerRedundancy,
    Redundancy,
    Stability,
    off_diagonal,
)
from chai_attention.reports.redundancy import redundancy_table
from chai_attention.reports.sections import (
    Charts,
    Panel,
    Section,
    grid_of,
    legend_of,
    machine_facts,
)
from chai_attention.reports.svg import Series, line_chart, linear_axis, log_axis, stack_chart

CURVES = 6  # elbow curves in one chart


def redundancy_section(study: Redundancy, source: str) -> Section:
    """Correlation, elbow curves, cluster sizes, stability, and maps to explore."""
    model, text = study.model, study.text
    charts = [_correlation(study.layers)]
    if study.stability is not None:
        charts.append(_stability(study, study.stability))
    charts += [_sizes(study.layers), _elbows(study.layers)]
    return Section(
        kind="redundancy",
        title=f"Redundancy of heads: {model['name']}",
        source=source,
        facts=[
            *machine_facts(study.machine),
            (
                "model",
                f"{model['name']} ({model['architecture']}): {model['layers']} layers, "
                f"{model['heads']} heads of {model['head_dim']}, {model['kv_heads']} K/V heads, "
                f"{model['dtype']}",
            ),
            (
                "text",
                f"{', '.join(text['sources'])}: {text['requests']} requests of {text['length']} "
                f"tokens, seed {text['seed']}",
            ),
        ],
        summary=_summary(study),
        charts=charts,
        tables=[grid_of(redundancy_table(study), "Layers")],
        explorer=_explorer(study) if study.prompts else None,
    )


def _summary(study: Redundancy) -> list[str]:
    means = [layer.mean_correlation for layer in study.layers]
    rest = [off_diagonal(layer.without_first) for layer in study.layers]
    lines = [
        f"Heads' attention maps correlate by {sum(means) / len(means):.2f} on average, "
        f"{min(means):.2f} to {max(means):.2f} by layer; without the first key of a request, on "
        f"which many heads park their attention, by {sum(rest) / len(rest):.2f}.",
    ]
    found = study.stability
    if found is not None:
        first, last = study.lengths[0], study.lengths[-1]
        lines.append(
            f"Clusters from the first {first} tokens agree with those of the whole request "
            f"({last} tokens) by {found.agreement[0][-1]:.2f} ±{found.agreement_error[0][-1]:.2f} "
            "(adjusted Rand index: 1 is equal, 0 is chance); clusters of all other requests "
            f"together do by {found.static[-1]:.2f} ±{found.static_error[-1]:.2f}."
        )
    return lines


def _correlation(layers: Sequence[LayerRedundancy]) -> Charts:
    curves = [
        Series("all keys", [(la.layer, la.mean_correlation, 0.0) for la in layers]),
        Series(
            "without the first key",
            [(la.layer, off_diagonal(la.without_first), 0.0) for la in layers],
            style=1,
        ),
        Series(
            "probability on the first key",
            [(la.layer, la.first_share, 0.0) for la in layers],
            style=2,
            dashed=True,
        ),
    ]
    values = [value for one in curves for _, value, _ in one.points]
    x = linear_axis("layer", [la.layer for la in layers])
    chart = line_chart(
        "Correlation of heads", x, linear_axis("mean over pairs", [*values, 1.0]), curves
    )
    return Charts(
        "Correlation of heads, by layer",
        [Panel("Mean correlation of two heads' maps", chart)],
        legend_of(curves),
        "Pearson correlation over all entries a query can see, all requests together.",
    )


def _stability(study: Redundancy, found: Stability) -> Charts:
    lengths, last = study.lengths, len(study.lengths) - 1
    x = log_axis("membership from the first n tokens", lengths)
    single = [
        Series(
            "single layers",
            [(n, value, 0.0) for n, value in zip(lengths, la.stability.agreement[0], strict=True)],
            faint=True,
        )
        for la in study.layers
        if la.stability is not None
    ]
    first = Series(
        f"first {lengths[0]}",
        list(zip(lengths, found.agreement[0], found.agreement_error[0], strict=True)),
    )
    whole = Series(
        "whole request",
        list(zip(lengths, found.agreement[last], found.agreement_error[last], strict=True)),
        style=1,
    )
    static = Series(
        "all other requests (static)",
        list(zip(lengths, found.static, found.static_error, strict=True)),
        style=2,
    )
    kept = Series("kept", list(zip(lengths, found.kept, found.kept_error, strict=True)), style=3)
    lowest = min([0.0, *(value for one in single for _, value, _ in one.points)])
    y = linear_axis("agreement (ARI)", [lowest, 1.0])
    panels = [
        Panel(title, line_chart(title, x, axis, curves, marks=[0.0]))
        for title, axis, curves in (
            (
                f"with the clusters of the first {lengths[0]} tokens; thin: single layers",
                y,
                [*single, first],
            ),
            ("with the clusters of the whole request, or of all others", y, [whole, static]),
            (
                f"share of heads still in their cluster of the first {lengths[0]}",
                linear_axis("share of heads", [0.0, 1.0]),
                [kept],
            ),
        )
    ]
    return Charts(
        "Do clusters stay while a request grows?",
        panels,
        legend_of([first, whole, static, kept]),
        "Means over layers whose membership can change; bars are one standard error over "
        "requests. Agreement is corrected for chance, the share of heads is not: random clusters "
        "keep a good part.",
    )


def _sizes(layers: Sequence[LayerRedundancy]) -> Charts:
    chart = stack_chart(
        "Cluster sizes",
        "layer",
        "heads",
        [str(layer.layer) for layer in layers],
        [layer.sizes for layer in layers],
    )
    return Charts("Cluster sizes, by layer", [Panel("Every box is a cluster", chart)])


def _elbows(layers: Sequence[LayerRedundancy]) -> Charts:
    heads = len(layers[0].inertia)
    x = linear_axis("clusters", [1, heads])
    y = linear_axis("inertia, share of one cluster's", [0.0, 1.0])
    panels = []
    for start in range(0, len(layers), CURVES):
        part = layers[start : start + CURVES]
        curves, elbows = [], []
        for index, layer in enumerate(part):
            top = layer.inertia[0] or 1.0
            curve = [(k, error / top, 0.0) for k, error in enumerate(layer.inertia, start=1)]
            curves.append(Series(f"layer {layer.layer}", curve, style=index, marked=False))
            elbows.append(
                Series(
                    f"layer {layer.layer}: {layer.elbow}",
                    [curve[layer.elbow - 1]],
                    style=index,
                    joined=False,
                    labels=[f"layer {layer.layer}: elbow at {layer.elbow} clusters"],
                )
            )
        title = f"layers {part[0].layer} to {part[-1].layer}; the elbow of each"
        chart = line_chart(title, x, y, [*curves, *elbows])
        panels.append(Panel(title, chart, legend_of(elbows)))
    return Charts(
        "Elbow curves",
        panels,
        note="k-means inertia against the number of clusters; the mark is the curve's elbow.",
    )


def _explorer(study: Redundancy) -> Mapping[str, Any]:
    """What the page's script needs, and no more."""
    return {
        "heads": study.model["heads"],
        "profiles": [],
        "layers": [
            {
                "layer": layer.layer,
                "correlation": layer.correlation,
                "representatives": layer.representatives,
            }
            for layer in study.layers
        ],
        "prompts": [
            {
                "name": prompt.name,
                "tokens": prompt.tokens,
                "block": prompt.block,
                "lengths": prompt.lengths,
                "representatives": prompt.representatives,
                "maps": prompt.maps,
            }
            for prompt in study.prompts
        ],
    }
