"""Validation of profiles, with errors that say how to fix them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from chai_attention.ranks import rank_problem, spare

if TYPE_CHECKING:
    from torch import Tensor

    from chai_attention.profile import ClusterProfile, ModelShape

# Bounds far above every model there is: what is larger is a mistake, or a file that is meant to
# harm, and would only be met as missing memory or an overflow somewhere inside.
MOST_LAYERS = 4096
MOST_HEADS = 4096
MOST_HEAD_DIM = 2**16
MOST_TOKENS = 2**24
MOST_WEIGHT = 1e6  # of a blend
MOST_NUMBER = 1e30  # in tables: their sums and products with a blend stay finite in float32
_CHOICES = {
    "membership": ("online", "static", "blend"),
    "target": ("scores", "k-bytes"),
    "features": ("scores", "value"),
}

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
    clusters: Any = profile.clusters  # what a file holds need not be what the annotations say
    if not isinstance(clusters, tuple) or not clusters or not all(map(_is_whole, clusters)):
        return ["'clusters' must list a whole number of at least 1 for every layer"]
    if len(clusters) > MOST_LAYERS or max(clusters) > MOST_HEADS:
        return [f"'clusters' is at most {MOST_LAYERS} layers of at most {MOST_HEADS} heads"]
    if 0 in clusters and profile.streaming is None:
        return ["'clusters' must be at least 1 in every layer whose heads do not all stream"]
    problems = [*choice_problems(profile), *_model(profile.model)]
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
        or [*_tables(profile), *_notes(profile), *_streaming(profile)]
        or [*_representatives(profile), *_curves(profile), *_squares(profile)]
    )


def choice_problems(choices: Any) -> Iterator[str]:
    """What is wrong with options that profiles have in common with the settings of a calibration.

    Args:
        choices: a profile or settings, of which none is open: membership, target, features, blend,
            window, probe_start, recent, sinks and tensor_parallel.
    """
    for name, known in _CHOICES.items():
        yield from none_of(name, getattr(choices, name), known)
    for name, least, most in (
        ("window", 1, MOST_TOKENS),
        ("probe_start", 0, MOST_TOKENS),
        ("tensor_parallel", 1, MOST_HEADS),
    ):
        value = getattr(choices, name)
        if not _is_whole(value, least, most):
            yield f"{name} {value!r} is not a whole number of {least} to {most}"
    if not all(_is_whole(tokens, 0, MOST_TOKENS) for tokens in (choices.recent, choices.sinks)):
        yield f"recent and sinks are numbers of tokens, whole ones of 0 to {MOST_TOKENS}"
    elif choices.sinks and not choices.recent:
        yield "sinks need a recent window of at least 1 token"
    membership, weight = choices.membership, choices.blend
    if not _is_nested(weight, 0) or not 0 <= weight <= MOST_WEIGHT:
        yield f"blend is a weight of 0 to {MOST_WEIGHT:,.0f}, not {weight!r}"
    elif membership != "blend" and (choices.features == "value" or weight):
        yield "features value and a blend weight need membership blend"
    if membership != "static" and choices.tensor_parallel != 1:
        yield (
            "tensor_parallel belongs to a static membership only: with another each rank clusters "
            "its own heads when it serves, and keeps nothing to spare if the number of ranks "
            "divides the clusters of every layer"
        )


def none_of(name: str, value: object, known: Sequence[str]) -> Iterator[str]:
    """Say that an option is none of those that are known, if it is not."""
    if value not in known:
        yield f"{name} {value!r} is none of {', '.join(known)}"


def target_problems(target: str, shape: ModelShape) -> Iterator[str]:
    """Why a model of ``shape`` cannot have this target, if it cannot."""
    if target == "k-bytes" and shape.kv_heads == shape.heads:
        yield "target k-bytes is for grouped-query models: use scores"
    elif target == "k-bytes" and shape.kv_heads == 1:
        yield "target k-bytes needs several K/V heads, the model has one per layer: use scores"


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
        if name in model and not _is_whole(model[name], 1, most):
            problems.append(f"{name} of 'model' must be a whole number of 1 to {most}")
    if not problems and "heads" in model and model["heads"] % model.get("kv_heads", 1):
        problems.append("heads of 'model' must be a multiple of kv_heads")
    return problems


def _tables(profile: ClusterProfile) -> Iterator[str]:
    """Tables that do not go with the membership, or with what is exact."""
    for name, kind, whose in (
        ("representatives", "static", "a static"),
        ("costs", "blend", "a blended"),
    ):
        if profile.membership == kind and getattr(profile, name) is None:
            yield f"{whose} membership needs {name!r}"
        if profile.membership != kind and getattr(profile, name) is not None:
            yield f"{name!r} belong to {whose} membership only"
    if profile.offsets is not None and not profile.recent:
        yield "'offsets' need a recent window of at least 1 token"


def misfits(profile: ClusterProfile, shape: ModelShape) -> list[str]:
    """What keeps a profile from running in a model of ``shape``."""
    said = profile.model or {}
    problems = [
        f"{name} is {value} in the profile, {actual} in the model"
        for name, value in said.items()
        if value != (actual := getattr(shape, name))
    ]
    if len(profile.clusters) != shape.layers and "layers" not in said:
        problems.append(
            f"{len(profile.clusters)} layers in the profile, {shape.layers} in the model"
        )
    if not problems:
        problems = [*target_problems(profile.target, shape), *_layers(profile, shape)]
        problems += _refit(profile, shape)
    return problems or _spare(profile, shape)


def _layers(profile: ClusterProfile, shape: ModelShape) -> Iterator[str]:
    """Layers that this model cannot run."""
    heads, group = shape.heads, shape.group_size
    grouped = profile.target == "k-bytes"
    for layer, (k, free) in enumerate(zip(profile.clusters, shape.clusterable, strict=True)):
        streaming = profile.streaming_heads(layer)
        left = heads - len(streaming)
        if streaming and streaming[-1] >= heads:
            yield f"layer {layer}: a streaming head is not one of {heads}"
        elif k > left:
            others = f" that do not stream, of {heads}" if streaming else ""
            yield f"layer {layer} has {k} clusters but {left} heads{others}"
        elif k == 0 and left:
            yield f"layer {layer}: no head is left whose far scores others can use"
        elif k < heads and not free:
            yield (f"layer {layer} is a sliding-window layer and must keep all {heads} heads")
        elif grouped and k % group:
            yield f"layer {layer}: {k} clusters is not a multiple of {group}"
        elif profile.membership != "static" and any(
            len([h for h in streaming if h // group == g]) not in (0, group)
            for g in range(shape.kv_heads)
        ):
            yield (
                f"layer {layer}: in an {profile.membership} profile all {group} query heads of a "
                "K/V head stream, or none"
            )
    for name in ("costs", "offsets"):
        for layer, table in enumerate(getattr(profile, name) or ()):
            if len(table) != heads:
                yield f"layer {layer}: {name} are of {len(table)} heads"
    for layer, rep in enumerate(profile.representatives or ()):
        far = profile.far_representatives(layer)
        if len(rep) != heads:
            yield f"layer {layer} lists {len(rep)} representatives"
        elif grouped and len({r // group for r in far}) * group != len(far):
            yield (
                f"layer {layer}: the representatives of target k-bytes must be all query heads "
                "of the K/V heads that keep their K"
            )


def _spare(profile: ClusterProfile, shape: ModelShape) -> list[str]:
    """Where ranks that a profile was made for would keep heads to spare."""
    ranks = profile.tensor_parallel
    if ranks == 1:
        return []
    if problem := rank_problem(shape.heads, shape.kv_heads, ranks):
        return [problem]
    return [
        f"layer {layer}: made for {ranks} ranks, but {reason}"
        for layer, rep in enumerate(profile.representatives or ())
        for reason in spare(rep, profile.streaming_heads(layer), shape.kv_heads, ranks)
    ]


def _streaming(profile: ClusterProfile) -> Iterator[str]:
    """What is wrong with the lists of streaming heads."""
    for layer, heads in enumerate(profile.streaming or ()):
        if not all(map(_is_whole, heads)) or list(heads) != sorted(set(heads)):
            yield f"layer {layer}: 'streaming' must list heads once each, ascending"
    if any(profile.streaming or ()) and profile.recent == 0:
        yield "streaming heads need a recent window of at least 1 token"


def _notes(profile: ClusterProfile) -> Iterator[str]:
    """What is wrong with the entry of the refit."""
    refit: Any = profile.refit
    if refit is not None and (
        not isinstance(refit, Mapping)
        or not {"kind"} <= set(refit) <= {"kind", "file", "sha256"}
        or refit["kind"] not in ("output", "bias")
        or not all(isinstance(value, str) for value in refit.values())
    ):
        yield "'refit' needs kind (output or bias), file and sha256"
    if profile.corrections is not None and refit is None:
        yield "'corrections' need a 'refit' that says of which kind they are"


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


def _refit(profile: ClusterProfile, shape: ModelShape) -> list[str]:
    """What keeps a refit from running in this model."""
    if profile.refit is None:
        return []
    if profile.corrections is None:
        return ["it has a refit but not its tensors: load it from its file, or use one without"]
    inputs = shape.heads * shape.head_dim
    if problems := tensor_problems(profile.corrections):
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


def _representatives(profile: ClusterProfile) -> Iterator[str]:
    """Layers whose static membership is inconsistent."""
    for layer, rep in enumerate(profile.representatives or ()):
        heads, streaming = len(rep), set(profile.streaming_heads(layer))
        far = set(rep) - streaming
        if not all(_is_whole(r, 0, heads - 1) for r in rep):
            yield f"layer {layer}: a representative is not a head"
        elif any(rep[r] != r for r in rep):
            yield f"layer {layer}: a representative must represent itself"
        elif any(r != h for h, r in enumerate(rep) if h in streaming or r in streaming):
            yield f"layer {layer}: a streaming head represents itself alone"
        elif len(far) != (k := profile.clusters[layer]):
            yield f"layer {layer}: {len(far)} representatives, {k} clusters"


def _curves(profile: ClusterProfile) -> Iterator[str]:
    """Layers whose error curve does not fit."""
    for layer, curve in enumerate(profile.error or ()):
        heads = 0 if profile.similarity is None else len(profile.similarity[layer])
        if not curve or heads % len(curve):
            yield f"layer {layer}: {len(curve)} points of the error curve do not fit"


def _squares(profile: ClusterProfile) -> list[str]:
    """Layers whose tables of pairs of heads have the wrong size."""
    return [
        f"layer {layer}: {name} must be one row and column per head"
        for name in ("similarity", "costs", "offsets")
        for layer, table in enumerate(getattr(profile, name) or ())
        if len(table) < profile.clusters[layer] or any(len(row) != len(table) for row in table)
    ]


def _is_json(value: Mapping[str, Any]) -> bool:
    """Whether it can be written as JSON that every reader takes."""
    try:
        json.dumps(dict(value), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_whole(value: object, least: int = 0, most: float = inf) -> bool:
    return type(value) is int and least <= value <= most


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
