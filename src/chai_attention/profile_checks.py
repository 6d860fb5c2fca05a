"""What can be wrong inside a profile, said so that a person can mend it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chai_attention.profile import ClusterProfile, Shape

_CORRECTION = re.compile(r"layers\.(?P<layer>\d+)\.(?:weight|(?P<bias>bias))")
# tables with one entry per layer, and how deep their lists are
_DEPTHS = {"representatives": 2, "error": 2, "similarity": 3, "costs": 3, "offsets": 3}


def problems_of(profile: ClusterProfile) -> list[str]:
    """Everything that is wrong with a profile by itself."""
    problems = []
    clusters: Any = profile.clusters  # what a file holds need not be what the annotations say
    if not isinstance(clusters, tuple) or not clusters or not all(map(_is_count, clusters)):
        return ["'clusters' must list a whole number of at least 1 for every layer"]
    if profile.membership not in ("online", "static", "blend"):
        problems.append(f"membership {profile.membership!r} is none of online, static, blend")
    if not _is_count(profile.window):
        problems.append(f"window {profile.window!r} is not a whole number of at least 1")
    if profile.target not in ("scores", "k-bytes"):
        problems.append(f"target {profile.target!r} is neither scores nor k-bytes")
    model: Any = profile.model
    provenance: Any = profile.provenance
    if not isinstance(model, Mapping | None):
        problems.append("'model' must be an object")
    else:
        known = {"architecture", "layers", "heads", "kv_heads", "head_dim"}
        strange = sorted(set(model or {}) - known)
        if strange:
            problems.append(f"unknown entries of 'model': {', '.join(strange)}")
    if not isinstance(provenance, Mapping | None):
        problems.append("'provenance' must be an object")
    for name, depth in _DEPTHS.items():
        value = getattr(profile, name)
        if value is None:
            continue
        if not _is_nested(value, depth):
            kind = "table" if depth == 3 else "list"
            problems.append(f"{name!r} must hold one {kind} of numbers per layer")
        elif len(value) != len(clusters):
            problems.append(f"{name!r} has {len(value)} layers, 'clusters' {len(clusters)}")
    return (
        problems
        or _membership(profile) + _recent(profile) + _notes(profile)
        or _representatives(profile) + _curves(profile) + _squares(profile)
    )


def _membership(profile: ClusterProfile) -> list[str]:
    """What does not go with the kind of membership."""
    problems = []
    static = profile.membership == "static"
    if static and profile.representatives is None:
        problems.append("a static membership needs 'representatives'")
    if not static and profile.representatives is not None:
        problems.append("'representatives' belong to a static membership only")
    if not _is_count_or_zero(profile.probe_start):
        problems.append(f"probe_start {profile.probe_start!r} is not a whole number of at least 0")
    if profile.features not in ("scores", "value"):
        problems.append(f"features {profile.features!r} is neither scores nor value")
    blended = profile.membership == "blend"
    if blended and profile.costs is None:
        problems.append("a blended membership needs 'costs'")
    if not blended and profile.costs is not None:
        problems.append("'costs' belong to a blended membership only")
    if profile.features == "value" and not blended:
        problems.append("features value needs membership blend")
    weight: Any = profile.blend
    if not _is_nested(weight, 0) or weight < 0 or (weight and not blended):
        problems.append("'blend' is a weight of at least 0, for membership blend")
    return problems


def _recent(profile: ClusterProfile) -> list[str]:
    """What is wrong with the exact recent window."""
    if not (_is_count_or_zero(profile.recent) and _is_count_or_zero(profile.sinks)):
        return ["'recent' and 'sinks' are whole numbers of at least 0"]
    if not profile.recent and (profile.sinks or profile.offsets is not None):
        return ["'sinks' and 'offsets' need a recent window of at least 1 token"]
    return []


def _notes(profile: ClusterProfile) -> list[str]:
    """What is wrong with the refit and the promise."""
    problems = []
    refit: Any = profile.refit
    if refit is not None and (
        not isinstance(refit, Mapping)
        or not {"kind"} <= set(refit) <= {"kind", "file", "sha256"}
        or refit["kind"] not in ("output", "bias")
        or not all(isinstance(value, str) for value in refit.values())
    ):
        problems.append("'refit' needs kind (output or bias), file and sha256")
    if profile.corrections is not None and refit is None:
        problems.append("'corrections' need a 'refit' that says of which kind they are")
    promise: Any = profile.promise
    if not isinstance(promise, Mapping | None):
        problems.append("'promise' must be an object")
    return problems


def refit_problems(profile: ClusterProfile, shape: Shape) -> list[str]:
    """What keeps a refit from running in a model of ``shape``."""
    if profile.refit is None:
        return []
    if profile.corrections is None:
        return ["it has a refit but not its tensors: load it from its file, or use one without"]
    inputs = shape.heads * shape.head_dim
    problems = []
    for name, tensor in profile.corrections.items():
        match = _CORRECTION.fullmatch(name)
        if match is None or int(match["layer"]) >= shape.layers:
            problems.append(f"the refit holds {name}, which this model does not have")
            continue
        # a config need not say how long the hidden states are: then that is not compared
        wanted = [shape.hidden_size or tensor.shape[0], inputs][: 1 if match["bias"] else 2]
        if list(tensor.shape) != wanted:
            problems.append(f"{name} of the refit is {list(tensor.shape)}, not {wanted}")
    if problems:
        problems.append(
            "the refit was made for another model: calibrate this one, or use a profile without"
        )
    return problems


def _representatives(profile: ClusterProfile) -> list[str]:
    """Layers whose static membership is inconsistent."""
    problems = []
    for layer, rep in enumerate(profile.representatives or ()):
        heads = len(rep)
        if not all(_is_count(r + 1) and r < heads for r in rep):
            problems.append(f"layer {layer}: a representative is not a head")
        elif any(rep[r] != r for r in rep):
            problems.append(f"layer {layer}: a representative must represent itself")
        elif len(set(rep)) != (k := profile.clusters[layer]):
            problems.append(f"layer {layer}: {len(set(rep))} representatives, {k} clusters")
    return problems


def _curves(profile: ClusterProfile) -> list[str]:
    """Layers whose error curve or similarity has the wrong size."""
    problems = []
    for layer, k in enumerate(profile.clusters):
        heads = None
        if profile.similarity is not None:
            heads = len(profile.similarity[layer])
            if heads < k or any(len(row) != heads for row in profile.similarity[layer]):
                problems.append(f"layer {layer}: similarity must be one row and column per head")
        if profile.error is not None:
            points = len(profile.error[layer])
            if points < 1 or (heads is not None and heads % points):
                problems.append(f"layer {layer}: {points} points of the error curve do not fit")
    return problems


def _squares(profile: ClusterProfile) -> list[str]:
    """Layers whose tables of pairs of heads have the wrong size."""
    problems = []
    for name in ("costs", "offsets"):
        for layer, table in enumerate(getattr(profile, name) or ()):
            heads = len(table)
            if heads < profile.clusters[layer] or any(len(row) != heads for row in table):
                problems.append(f"layer {layer}: {name} must be one row and column per head")
    return problems


def _is_count_or_zero(value: object) -> bool:
    return _is_count(value) or (value == 0 and type(value) is int)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_nested(value: object, depth: int) -> bool:
    """Whether ``value`` is tuples of tuples ... of numbers, ``depth`` deep."""
    if depth == 0:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, tuple) and all(_is_nested(item, depth - 1) for item in value)


def tuples(value: Any) -> Any:
    """Turn lists into tuples, all the way down."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value
