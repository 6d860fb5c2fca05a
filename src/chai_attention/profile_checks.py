"""What can be wrong inside a profile, said so that a person can mend it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from chai_attention.ranks import rank_problem, spare

if TYPE_CHECKING:
    from torch import Tensor

    from chai_attention.profile import ClusterProfile, Shape

# Bounds far above every model there is: what is larger is a mistake, or a file that is meant to
# harm, and would only be met as missing memory or an overflow somewhere inside.
MOST_LAYERS = 4096
MOST_HEADS = 4096
MOST_HEAD_DIM = 2**16
MOST_TOKENS = 2**24
MOST_WEIGHT = 1e6  # of a blend
MOST_NUMBER = 1e30  # in tables: their sums and products with a blend stay finite in float32

_CORRECTION = re.compile(r"layers\.(?P<layer>[0-9]{1,6})\.(?:weight|(?P<bias>bias))")
_MODEL = {
    "layers": MOST_LAYERS,
    "heads": MOST_HEADS,
    "kv_heads": MOST_HEADS,
    "head_dim": MOST_HEAD_DIM,
}
# tables with one entry per layer, and how deep their lists are
_DEPTHS = {
    "representatives": 2, "streaming": 2, "error": 2, "similarity": 3, "costs": 3, "offsets": 3,
}  # fmt: skip


def problems_of(profile: ClusterProfile) -> list[str]:
    """Everything that is wrong with a profile by itself."""
    problems = []
    clusters: Any = profile.clusters  # what a file holds need not be what the annotations say
    if not isinstance(clusters, tuple) or not clusters or not all(map(_is_place, clusters)):
        return ["'clusters' must list a whole number of at least 1 for every layer"]
    if len(clusters) > MOST_LAYERS or max(clusters) > MOST_HEADS:
        return [f"'clusters' is at most {MOST_LAYERS} layers of at most {MOST_HEADS} heads"]
    if 0 in clusters and profile.streaming is None:
        return ["'clusters' must be at least 1 in every layer whose heads do not all stream"]
    if profile.membership not in ("online", "static", "blend"):
        problems.append(f"membership {profile.membership!r} is none of online, static, blend")
    if not _is_tokens(profile.window, least=1):
        problems.append(f"window {profile.window!r} is not a whole number of 1 to {MOST_TOKENS}")
    if profile.target not in ("scores", "k-bytes"):
        problems.append(f"target {profile.target!r} is neither scores nor k-bytes")
    problems += _model(profile.model)
    for name in ("provenance", "promise"):
        value = getattr(profile, name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            problems.append(f"{name!r} must be an object")
        elif not _is_json(value):
            problems.append(f"{name!r} holds something that JSON has no word for, such as NaN")
    for name, depth in _DEPTHS.items():
        value = getattr(profile, name)
        if value is None:
            continue
        if not _is_nested(value, depth):
            kind = "table" if depth == 3 else "list"
            problems.append(f"{name!r} must hold one {kind} of numbers per layer, all finite")
        elif len(value) != len(clusters):
            problems.append(f"{name!r} has {len(value)} layers, 'clusters' {len(clusters)}")
    return (
        problems
        or _membership(profile)
        + _recent(profile)
        + _notes(profile)
        + _streaming(profile)
        + _ranks(profile)
        or _representatives(profile) + _curves(profile) + _squares(profile)
    )


def _model(model: Any) -> list[str]:
    """What is wrong with what a profile says about its model."""
    if model is None:
        return []
    if not isinstance(model, Mapping):
        return ["'model' must be an object"]
    problems = []
    strange = sorted(map(str, set(model) - {"architecture", *_MODEL}))
    if strange:
        problems.append(f"unknown entries of 'model': {', '.join(strange)}")
    if not isinstance(model.get("architecture", ""), str):
        problems.append("architecture of 'model' must be a text")
    for name, most in _MODEL.items():
        if name in model and not (_is_count(model[name]) and model[name] <= most):
            problems.append(f"{name} of 'model' must be a whole number of 1 to {most}")
    if not problems and "heads" in model and model["heads"] % model.get("kv_heads", 1):
        problems.append("heads of 'model' must be a multiple of kv_heads")
    return problems


def _membership(profile: ClusterProfile) -> list[str]:
    """What does not go with the kind of membership."""
    problems = []
    static = profile.membership == "static"
    if static and profile.representatives is None:
        problems.append("a static membership needs 'representatives'")
    if not static and profile.representatives is not None:
        problems.append("'representatives' belong to a static membership only")
    if not _is_tokens(profile.probe_start):
        problems.append(
            f"probe_start {profile.probe_start!r} is not a whole number of 0 to {MOST_TOKENS}"
        )
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
    if not _is_nested(weight, 0) or not 0 <= weight <= MOST_WEIGHT or (weight and not blended):
        problems.append(f"'blend' is a weight of 0 to {MOST_WEIGHT:,.0f}, for membership blend")
    return problems


def _recent(profile: ClusterProfile) -> list[str]:
    """What is wrong with the exact recent window."""
    if not (_is_tokens(profile.recent) and _is_tokens(profile.sinks)):
        return [f"'recent' and 'sinks' are whole numbers of 0 to {MOST_TOKENS}"]
    if not profile.recent and (profile.sinks or profile.offsets is not None):
        return ["'sinks' and 'offsets' need a recent window of at least 1 token"]
    return []


def _ranks(profile: ClusterProfile) -> list[str]:
    """What is wrong with the number of ranks that heads were chosen for."""
    ranks: Any = profile.tensor_parallel
    if not _is_count(ranks) or ranks > MOST_HEADS:
        return [f"tensor_parallel {ranks!r} is not a whole number of 1 to {MOST_HEADS}"]
    if ranks > 1 and profile.membership != "static":
        return ["'tensor_parallel' belongs to a static membership only"]
    return []


def rank_problems(profile: ClusterProfile, shape: Shape) -> list[str]:
    """Where ranks that a profile was made for would keep heads to spare in a model of ``shape``."""
    ranks = profile.tensor_parallel
    if ranks == 1:
        return []
    problem = rank_problem(shape.heads, shape.kv_heads, ranks)
    if problem is not None:
        return [problem]
    return [
        f"layer {layer}: made for {ranks} ranks, but {reason}"
        for layer, rep in enumerate(profile.representatives or ())
        for reason in spare(rep, profile.streaming_heads(layer), shape.kv_heads, ranks)
    ]


def _streaming(profile: ClusterProfile) -> list[str]:
    """What is wrong with the lists of streaming heads."""
    problems = []
    for layer, heads in enumerate(profile.streaming or ()):
        if not all(map(_is_place, heads)) or list(heads) != sorted(set(heads)):
            problems.append(f"layer {layer}: 'streaming' must list heads once each, ascending")
    if any(profile.streaming or ()) and profile.recent == 0:
        problems.append("streaming heads need a recent window of at least 1 token")
    return problems


def _notes(profile: ClusterProfile) -> list[str]:
    """What is wrong with the entry of the refit."""
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
    return problems


def tensor_problems(corrections: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with a refit's tensors by themselves."""
    problems = []
    for name, tensor in corrections.items():
        match = _CORRECTION.fullmatch(name)
        if match is None:
            problems.append(
                f"the refit holds {name!r}, which a model does not have: it is no weight or bias "
                "of a layer"
            )
        elif not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            problems.append(f"{name} of the refit is {tensor.dtype}, not floating point")
        elif tensor.ndim != (1 if match["bias"] else 2):
            problems.append(f"{name} of the refit has {tensor.ndim} dimensions")
        elif not tensor.isfinite().all():
            problems.append(f"{name} of the refit holds NaN or infinity")
    return problems


def refit_problems(profile: ClusterProfile, shape: Shape) -> list[str]:
    """What keeps a refit from running in a model of ``shape``."""
    if profile.refit is None:
        return []
    if profile.corrections is None:
        return ["it has a refit but not its tensors: load it from its file, or use one without"]
    inputs = shape.heads * shape.head_dim
    problems = tensor_problems(profile.corrections)
    if problems:
        return problems
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
        heads, streaming = len(rep), set(profile.streaming_heads(layer))
        far = set(rep) - streaming
        if not all(_is_count(r + 1) and r < heads for r in rep):
            problems.append(f"layer {layer}: a representative is not a head")
        elif any(rep[r] != r for r in rep):
            problems.append(f"layer {layer}: a representative must represent itself")
        elif any(r != h for h, r in enumerate(rep) if h in streaming or r in streaming):
            problems.append(f"layer {layer}: a streaming head represents itself alone")
        elif len(far) != (k := profile.clusters[layer]):
            problems.append(f"layer {layer}: {len(far)} representatives, {k} clusters")
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


def _is_json(value: Mapping[str, Any]) -> bool:
    """Whether it can be written as JSON that every reader takes."""
    try:
        json.dumps(dict(value), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_tokens(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value <= MOST_TOKENS


def _is_place(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_nested(value: object, depth: int) -> bool:
    """Whether ``value`` is tuples of tuples ... of numbers of a bounded size, ``depth`` deep."""
    if depth == 0:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return -MOST_NUMBER <= value <= MOST_NUMBER  # NaN is neither
    return isinstance(value, tuple) and all(_is_nested(item, depth - 1) for item in value)


def tuples(value: Any, depth: int = 4) -> Any:
    """Turn lists into tuples, as deep as a table can be; what is deeper stays and is refused."""
    if not isinstance(value, list) or not depth:
        return value
    return tuple(tuples(item, depth - 1) for item in value)
