"""Page section of a redundancy study, and the data of its explorer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chai_attention.evaluation.redundancy_files import Redundancy, off_diagonal
from chai_attention.reports.redundancy import (
    correlation_panel,
    elbow_panels,
    redundancy_table,
    sizes_panel,
    stability_panels,
)
from chai_attention.reports.sections import Charts, Section, grid_of, machine_facts


def redundancy_section(study: Redundancy, source: str) -> Section:
    """Correlation, elbow curves, cluster sizes, stability, and maps to explore."""
    model, text = study.model, study.text
    charts = [
        Charts(
            "Correlation of heads, by layer",
            [correlation_panel(study)],
            "Pearson correlation over all entries a query can see, all requests together.",
        ),
        Charts(
            "Do clusters stay while a request grows?",
            stability_panels(study),
            "Means over layers whose membership can change; bars are one standard error over "
            "requests. Agreement is corrected for chance, the share of heads is not: random "
            "clusters keep a good part.",
        ),
        Charts("Cluster sizes, by layer", [sizes_panel(study)]),
        Charts(
            "Elbow curves",
            elbow_panels(study),
            "k-means inertia against the number of clusters; the mark is the curve's elbow.",
        ),
    ]
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
        charts=[group for group in charts if group.panels],
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


def _explorer(study: Redundancy) -> Mapping[str, Any]:
    """What the page's script needs, and no more."""
    of_layers = ("layer", "correlation", "representatives")
    of_prompts = ("name", "tokens", "block", "lengths", "representatives", "maps")
    return {
        "heads": study.model["heads"],
        "profiles": [],
        "layers": [{name: getattr(one, name) for name in of_layers} for one in study.layers],
        "prompts": [{name: getattr(one, name) for name in of_prompts} for one in study.prompts],
    }
