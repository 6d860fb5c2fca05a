"""Page section of a profile: what every head does with its far keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

from chai_attention.profile import ClusterProfile
from chai_attention.reports.answer import profile_answer
from chai_attention.reports.head_kinds import FORGET, KINDS, MEANING, head_kinds, kind_numbers
from chai_attention.reports.plots import heads_panel
from chai_attention.reports.sections import Charts, Grid, Section, words


def profile_section(profile: ClusterProfile, source: str) -> Section:
    """What was calibrated, what it promises, and a square for each head of each layer."""
    kinds = head_kinds(profile)
    about = {**(profile.provenance or {}), **(profile.model or {})}
    facts = [(str(name), words(value)) for name, value in about.items() if value is not None]
    facts.append(("membership", profile.membership))
    if profile.recent:
        local = f"the last {profile.recent} and first {profile.sinks} keys"
        facts.append(("exact for every head", local))
    if profile.tensor_parallel > 1:
        facts.append(("tensor-parallel ranks", str(profile.tensor_parallel)))
    summary, charts = [], []
    if kinds is None:
        summary.append("Every request decides which heads keep their far keys and which share.")
    else:
        counts = Counter(chain(*kinds))
        summary.append(
            ", ".join(f"{counts[kind]} heads {kind} ({MEANING[kind]})" for kind in KINDS) + "."
        )
        charts.append(Charts("Heads: keep, share, forget", [heads_panel(kinds)]))
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
    rows = [[str(name), words(value)] for name, value in profile.promise.items()]
    return [Grid("Measured on held-out text", ["", ""], rows)]
