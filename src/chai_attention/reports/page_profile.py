"""The section of a page about a profile: what every head does with its far keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from chai_attention.profile import ClusterProfile
from chai_attention.reports.answer import profile_answer
from chai_attention.reports.head_kinds import (
    FORGET,
    KINDS,
    MEANING,
    count_kinds,
    head_kinds,
    kind_numbers,
)
from chai_attention.reports.sections import Charts, Grid, Panel, Section

LEFT, TOP, BOTTOM, WIDTH = 34, 20, 34, 340
LARGEST = 14  # a square's side


def profile_section(profile: ClusterProfile, source: str) -> Section:
    """What was calibrated, what it promises, and a square for each head of each layer."""
    kinds = head_kinds(profile)
    about = {**(profile.provenance or {}), **(profile.model or {})}
    facts = [(str(name), _words(value)) for name, value in about.items() if value is not None]
    facts.append(("membership", profile.membership))
    if profile.recent:
        near = f"the last {profile.recent} and first {profile.sinks} keys"
        facts.append(("exact for every head", near))
    summary, charts = [], []
    if kinds is None:
        summary.append("Every request decides which heads keep their far keys and which share.")
    else:
        counts = count_kinds(kinds)
        summary.append(
            ", ".join(f"{counts[kind]} heads {kind} ({MEANING[kind]})" for kind in KINDS) + "."
        )
        charts.append(
            Charts(
                "Heads: keep, share, forget",
                [Panel("What each head does with its far keys", heads_chart(kinds))],
                [(_square(kind), f"{kind}: {MEANING[kind]}") for kind in KINDS],
            )
        )
    return Section(
        kind="profile",
        title=f"Profile of {about.get('architecture', 'a model')}",
        source=source,
        facts=facts,
        answer=profile_answer(profile),
        summary=summary,
        charts=charts,
        tables=[_layers(profile), *_promise(profile)],
        profile=None if kinds is None else profile,
    )


def explorer_profile(section: Section, heads: int, layers: Sequence[int]) -> dict[str, Any] | None:
    """What the explorer of heads needs of a profile; None if it is of another model.

    Args:
        section: from `profile_section`.
        heads: H of the model that is explored.
        layers: those that are shown.
    """
    profile = section.profile
    if profile is None or profile.representatives is None:
        return None
    reps = profile.representatives
    if max(layers) >= len(reps) or len(reps[0]) != heads:
        return None
    return {
        "name": f"profile {section.source}",
        "representatives": [list(reps[layer]) for layer in layers],
        "streaming": [list(profile.streaming_heads(layer)) for layer in layers],
    }


def heads_chart(kinds: Sequence[Sequence[str]]) -> Markup:
    """A square for every layer (across) and head (down)."""
    layers, heads = len(kinds), len(kinds[0])
    side = min(LARGEST, (WIDTH - LEFT - 6) / layers)
    bottom = TOP + side * heads
    parts = [
        '<text class="label" x="2" y="13">head</text>',
        f'<text class="label" x="{LEFT + side * layers:.1f}" y="{bottom + 28:.1f}" '
        'text-anchor="end">layer</text>',
    ]
    gap = 1 if side > 4 else 0
    for layer, row in enumerate(kinds):
        for head, kind in enumerate(row):
            parts.append(
                f'<rect class="kind {kind}" x="{LEFT + side * layer:.1f}" '
                f'y="{TOP + side * head:.1f}" width="{side - gap:.1f}" height="{side - gap:.1f}">'
                f"<title>layer {layer}, head {head}: {kind}</title></rect>"
            )
    for number in range(0, layers, max(1, -(-layers // 10))):
        parts.append(
            f'<text class="tick" x="{LEFT + side * (number + 0.5):.1f}" y="{bottom + 13:.1f}" '
            f'text-anchor="middle">{number}</text>'
        )
    for number in range(0, heads, max(1, -(-heads // 10))):
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{TOP + side * (number + 0.5) + 3.5:.1f}" '
            f'text-anchor="end">{number}</text>'
        )
    counts = count_kinds(kinds)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    said = escape(f"What each of {heads} heads of {layers} layers does with its far keys: {told}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + BOTTOM:.0f}" role="img" '
        f'aria-label="{said}">{"".join(parts)}</svg>'
    )


def _layers(profile: ClusterProfile) -> Grid:
    """How many heads of each layer do what, and which of them forget."""
    heads = (profile.model or {}).get("heads")
    if profile.representatives is not None:
        heads = len(profile.representatives[0])
    rows = []
    for layer, clusters in enumerate(profile.clusters):
        streaming = profile.streaming_heads(layer)
        counts = {"keep": clusters, "share": "-", "forget": len(streaming)}
        if isinstance(heads, int):
            counts = dict(kind_numbers(profile, heads)[layer])
        names = ", ".join(map(str, streaming)) or "-"
        rows.append([str(layer), *(str(counts[kind]) for kind in KINDS), names])
    return Grid("Layers", ["layer", *KINDS, f"heads that {FORGET}"], rows)


def _promise(profile: ClusterProfile) -> list[Grid]:
    """All that was measured on held-out text."""
    if profile.promise is None:
        return []
    rows = [[str(name), _words(value)] for name, value in profile.promise.items()]
    return [Grid("Measured on held-out text", ["", ""], rows)]


def _square(kind: str) -> Markup:
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true">'
        f'<rect class="kind {kind}" x="8" y="1" width="12" height="12"/></svg>'
    )


def _words(value: Any) -> str:
    """A value of a profile, which may hold others."""
    if isinstance(value, Mapping):
        return f"({', '.join(f'{name} {_words(part)}' for name, part in value.items())})"
    return ", ".join(map(_words, value)) if isinstance(value, list | tuple) else str(value)
