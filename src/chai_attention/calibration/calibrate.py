"""`calibrate`: from a model and text to a `ClusterProfile` (CHAI, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.calibration.statistics import collect_grams, cosine_similarity
from chai_attention.calibration.texts import windows_of
from chai_attention.clustering.assign import K_BYTES, SCORES, TARGETS, assign
from chai_attention.clustering.elbow import cluster_counts, elbow, error_curve
from chai_attention.errors import CalibrationError
from chai_attention.integrations.transformers.support import ModelShape, describe
from chai_attention.profile import DEFAULT_WINDOW, ONLINE, STATIC, ClusterProfile

PAPER_WINDOW = 5
DEFAULT_LENGTH = 256
RECIPES = ("default", "paper")
# the bare elbow removes far too much where heads have little in common (docs/decisions.md)
DEFAULT_MAX_ERROR = {SCORES: 0.1, K_BYTES: 0.3}


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | Tensor,
    *,
    samples: int = 1024,
    length: int | None = None,
    window: int | None = None,
    clusters: str | int | Sequence[int] = "elbow",
    membership: str = ONLINE,
    target: str | None = None,
    max_error: float | None = None,
    recipe: str = "default",
    seed: int = 0,
    batch_size: int = 8,
    source: str = "given text",
    progress: Callable[[int, int], None] | None = None,
) -> ClusterProfile:
    """Find how many clusters of heads each layer needs.

    The features of a head are its causal attention probabilities over sample text; k-means error
    for every number of clusters, and the elbow of that curve, choose k per layer.

    Args:
        model: a supported causal language model.
        tokenizer: its tokenizer.
        texts: sample text, documents, or ready windows of tokens ``[N, S]`` int64.
        samples: windows of text to use.
        length: tokens per window; None for 256, or the model's maximum if that is less.
        window: tokens whose scores decide an online membership; None for 32 (paper: 5).
        clusters: "elbow", one number for all layers, or one per layer.
        membership: "online" or "static"; static takes the membership found on the sample text.
        target: "scores" or "k-bytes" (see `ClusterProfile`); None for k-bytes in grouped-query
            models with several K/V heads, else scores.
        max_error: with the elbow, never choose fewer clusters than needed for a relative
            clustering error of at most this, 0 to 1; 1 is no bound. None for 0.1 with
            "scores", 0.3 with "k-bytes", 1 with recipe "paper".
        recipe: "paper" is k-means on score maps, elbow counts, online membership from 5 tokens.
        seed: which windows of the text are used.
        batch_size: windows per forward.
        source: what to call the text in the profile.
        progress: called with (windows done, windows in all).

    Returns:
        A profile with error curves and head similarities; the same arguments give the same one.

    Raises:
        CalibrationError: options that contradict each other, or too little text.
        UnsupportedModelError: the model cannot be clustered.
    """
    shape = describe(model)
    target, window, membership = _options(shape, recipe, target, window, membership)
    if max_error is None:
        max_error = 1.0 if recipe == "paper" else DEFAULT_MAX_ERROR[target]
    if not 0 <= max_error <= 1:
        raise CalibrationError(
            f"max_error is a share of the error at k = 1, 0 to 1, not {max_error}"
        )
    counts = cluster_counts(shape.heads, shape.kv_heads, target)
    wanted = _wanted(clusters, shape, counts)
    windows = windows_of(texts, tokenizer, samples, window_length(model, length), seed)
    grams = collect_grams(
        model, windows, shape.layers, shape.heads, batch_size=batch_size, progress=progress
    )

    curves = [error_curve(gram, shape.kv_heads, target) for gram in grams]
    chosen = [
        shape.heads
        if not free
        else (elbow(counts, curve, max_error) if wanted is None else wanted[layer])
        for layer, (free, curve) in enumerate(zip(shape.clusterable, curves, strict=True))
    ]
    representatives = None
    if membership == STATIC:
        representatives = tuple(
            tuple(assign(gram[None], k, shape.kv_heads, target)[0].tolist())
            for gram, k in zip(grams, chosen, strict=True)
        )
    similarity = cosine_similarity(grams)
    return ClusterProfile(
        clusters=tuple(chosen),
        membership=membership,
        window=window,
        target=target,
        representatives=representatives,
        model=_identity(shape),
        provenance={
            "recipe": recipe,
            "method": ("k-means" if target == SCORES else "best K/V heads")
            + (", elbow" if wanted is None else ", given counts"),
            "features": "causal attention probabilities",
            "max_error": max_error if wanted is None else None,
            "text": source,
            "samples": windows.shape[0],
            "length": windows.shape[1],
            "seed": seed,
            "chai_attention": version("chai-attention"),
        },
        error=tuple(tuple(round(e, 6) for e in curve) for curve in curves),
        similarity=tuple(
            tuple(tuple(round(s, 3) for s in row) for row in layer) for layer in similarity.tolist()
        ),
    )


def window_length(model: PreTrainedModel, length: int | None = None) -> int:
    """Tokens per window of sample text: ``length``, or what fits the model.

    Raises:
        CalibrationError: a length that the model cannot read.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if length < 2 or (limit is not None and length > limit):
        most = f"at most {limit}, the longest text of this model" if limit else "of any number"
        raise CalibrationError(f"length must be at least 2 and {most}, not {length}")
    return length


def _options(
    shape: ModelShape, recipe: str, target: str | None, window: int | None, membership: str
) -> tuple[str, int, str]:
    """Fill in what depends on the model and the recipe; refuse contradictions."""
    if recipe not in RECIPES:
        raise CalibrationError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    if not any(shape.clusterable):
        raise CalibrationError(
            "every layer of this model is a sliding-window layer: there is nothing to cluster"
        )
    if membership not in (ONLINE, STATIC):
        raise CalibrationError(f"membership is online or static, not {membership!r}")
    if recipe == "paper":
        if membership != ONLINE or target == K_BYTES:
            raise CalibrationError(
                "recipe paper is an online membership on scores: leave out the other options"
            )
        target = SCORES
        window = PAPER_WINDOW if window is None else window
    if target is None:
        target = K_BYTES if 1 < shape.kv_heads < shape.heads else SCORES
    if target not in TARGETS:
        raise CalibrationError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    if target == K_BYTES and shape.kv_heads == 1:
        raise CalibrationError(
            "target k-bytes drops whole K/V heads, and this model has one per layer: use scores"
        )
    if target == K_BYTES and shape.kv_heads == shape.heads:
        raise CalibrationError("target k-bytes is for grouped-query models: use scores")
    window = DEFAULT_WINDOW if window is None else window
    if window < 1:
        raise CalibrationError(f"the probe window needs at least 1 token, not {window}")
    return target, window, membership


def _wanted(
    clusters: str | int | Sequence[int], shape: ModelShape, counts: list[int]
) -> list[int] | None:
    """Given counts as one per layer; None for the elbow."""
    if clusters == "elbow":
        return None
    if isinstance(clusters, str):
        raise CalibrationError(f"clusters is 'elbow', a number or one per layer, not {clusters!r}")
    if isinstance(clusters, int):
        wanted = [clusters if free else shape.heads for free in shape.clusterable]
    else:
        wanted = list(clusters)
    if len(wanted) != shape.layers:
        raise CalibrationError(f"{len(wanted)} numbers of clusters for {shape.layers} layers")
    for layer, (k, free) in enumerate(zip(wanted, shape.clusterable, strict=True)):
        if k not in (counts if free else counts[-1:]):
            allowed = ", ".join(map(str, counts if free else counts[-1:]))
            raise CalibrationError(f"layer {layer} cannot have {k} clusters; possible: {allowed}")
    return wanted


def _identity(shape: ModelShape) -> dict[str, Any]:
    """What a profile remembers of its model."""
    names = ("architecture", "layers", "heads", "kv_heads", "head_dim")
    return {name: getattr(shape, name) for name in names}
