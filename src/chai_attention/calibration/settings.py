"""Settings of a calibration: recipes, their options, and combinations that are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from chai_attention.calibration.costs import COSTS, GRADIENT, SCORES
from chai_attention.clustering.assign import K_BYTES
from chai_attention.clustering.elbow import cluster_counts
from chai_attention.errors import CalibrationError
from chai_attention.profile import BLEND, DEFAULT_WINDOW, ONLINE, STATIC
from chai_attention.profile_checks import choice_problems, none_of, target_problems
from chai_attention.ranks import rank_problem
from chai_attention.runtime.shape import ModelShape

PAPER_WINDOW = 5
DEFAULT_RECENT, DEFAULT_SINKS = 32, 4
DEFAULT_BLEND = 1.0
DEFAULT_MAX_LOSS = 0.01
DEFAULT_RECALL = 0.25
DEFAULT_MAX_RECALL_LOSS = 0.05
MOST_RECALL = 1e9
DEFAULT, SHARE, STREAM, ELBOW, PAPER = RECIPES = ("default", "share", "stream", "elbow", "paper")
AUTO = "auto"
RECENTS = (32, 64, 128, 256, 512)  # w among which AUTO chooses
DEFAULT_CONTEXT = 2048
MOST_CONTEXT = 2**24
REFITS = ("none", "output", "bias")
# the bare elbow removes far too much where heads have little in common (docs/decisions.md)
DEFAULT_MAX_ERROR = {"scores": 0.1, K_BYTES: 0.3}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a profile but the model and the text.

    None stands for what the recipe and the model make of it (see `resolve`).

    Attributes:
        recipe: "default" finds the smallest cache within a measured loss: every head keeps its far
            keys, shares another's or forgets them, which "share" and "stream" have one of only;
            "elbow" takes the elbow of the k-means error, bounded by ``max_error``; "paper" is CHAI
            as published.
        cost: what merging heads is judged by: "scores" (distance of attention maps), "value"
            (error of the layer's output) or "gradient" (change of the loss).
        membership: "online", "static" or "blend".
        target: "scores" or "k-bytes" (see `ClusterProfile`).
        window: probe tokens, whose scores decide an online or blended membership.
        probe_start: tokens before them.
        features: "scores" or "value", of a blended membership.
        blend: weight of the static cost in a blended membership.
        recent: w, last keys that every head attends to with its own scores; 0 for none; "auto"
            for the one of `RECENTS` that serves the budget best at ``context``.
        sinks: s, first keys that it does.
        refit: "none", "output" or "bias".
        clusters: "elbow", one number for all layers, or one per layer.
        max_error: with the elbow, bound on the relative clustering error.
        max_loss: budget: the perplexity rise on held-out text, 0.01 for 1%.
        save: budget: the share of K,V bytes not to keep, per token, or with streaming heads of
            those of ``context`` tokens, exact windows counted.
        context: tokens of the contexts that are meant to be served; with streaming heads.
        removed: budget: the share of heads (or of K/V heads) to remove.
        recall: weight of the costs of recalling facts beside those of the text (see
            `calibration.recall`), both per token that counts; 0 for none. By gradient costs only.
        tensor_parallel: N, ranks that the profile will be served on: heads share within a rank
            only, and all ranks keep as many K heads and V heads (see `ClusterProfile`).
        max_recall_loss: with ``max_loss``: how far the share of facts that are recalled may fall,
            0.05 for 5 points.
        measure: whether to measure what a saving (``save``, ``removed``) costs and to write it
            into the profile; a ``max_loss`` is always measured.
        seed: which sequences of the text are used, and of all else that is drawn.
    """

    recipe: str = "default"
    cost: str | None = None
    membership: str | None = None
    target: str | None = None
    window: int | None = None
    probe_start: int = 0
    features: str | None = None
    blend: float | None = None
    recent: int | str | None = None
    sinks: int | None = None
    refit: str | None = None
    clusters: str | int | Sequence[int] | None = None
    max_error: float | None = None
    max_loss: float | None = None
    save: float | None = None
    removed: float | None = None
    context: int | None = None
    recall: float | None = None
    max_recall_loss: float | None = None
    tensor_parallel: int = 1
    measure: bool = True
    seed: int = 0

    def _may_stream(self, target: str) -> bool:
        """Whether heads may forget their far keys, where ``target`` is the model's own.

        So it is with recipes "default" and "stream", unless another option says how heads are to
        share: streaming heads are chosen by gradient costs, for all requests, and by a budget.
        """
        return (
            self.recipe in (DEFAULT, STREAM)
            and self.cost in (None, GRADIENT)
            and self.membership in (None, STATIC)
            and self.target in (None, target)
            and self.recent != 0
            and self.clusters is None
            and self.max_error is None
        )

    def resolve(self, shape: ModelShape) -> Resolved:
        """Fill in what depends on the model and the recipe.

        Raises:
            CalibrationError: options that are unknown, out of range or contradict each other.
        """
        for problem in none_of("recipe", self.recipe, RECIPES):
            raise CalibrationError(problem)
        if shape.heads == 1:
            raise CalibrationError("this model has one head a layer: there is nothing to share")
        if not any(shape.clusterable):
            raise CalibrationError(
                "every layer of this model is a sliding-window layer: there is nothing to cluster"
            )
        given = {
            f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None
        }
        full = Resolved(**self._defaults(shape) | given)
        for problem in full.problems(shape):
            raise CalibrationError(problem)
        if self.max_error is not None and full.clusters != "elbow":
            raise CalibrationError(
                "max_error bounds the elbow: leave it out, or the numbers of clusters"
            )
        return full

    def _defaults(self, shape: ModelShape) -> dict[str, Any]:
        """What the recipe sets where the user did not."""
        grouped = 1 < shape.kv_heads < shape.heads
        found: dict[str, Any] = {
            "target": K_BYTES if grouped else "scores",
            "window": DEFAULT_WINDOW,
            "features": "scores",
            "recent": 0,
            "sinks": 0,
            "refit": "none",
            "cost": SCORES,
            "membership": ONLINE,
        }
        if self.recipe == PAPER:
            found |= {"target": "scores", "window": PAPER_WINDOW}
        budgeted = self.recipe in (DEFAULT, SHARE, STREAM)
        if budgeted:
            found |= {"cost": GRADIENT, "membership": STATIC, "recent": DEFAULT_RECENT}
        streams = self._may_stream(found["target"])
        if streams:
            found |= {"recent": AUTO, "context": DEFAULT_CONTEXT}
        if self.recipe == STREAM and not streams:
            raise CalibrationError(
                "recipe stream chooses heads by gradient costs, with an exact window, a static "
                "membership and a budget: leave out the options that say otherwise, or take recipe "
                "share"
            )
        if self.context is not None and not streams:
            raise CalibrationError("context is for recipes with streaming heads: leave it out")
        if (found["recent"] if self.recent is None else self.recent) != 0:
            found["sinks"] = DEFAULT_SINKS
        blended = (self.membership or found["membership"]) == BLEND
        found["blend"] = DEFAULT_BLEND if blended else 0.0
        budgets = (self.clusters, self.max_error, self.max_loss, self.save, self.removed)
        if all(budget is None for budget in budgets):
            if budgeted:
                found["max_loss"] = DEFAULT_MAX_LOSS
            else:
                found["clusters"] = "elbow"
        if streams:
            found["recall"] = DEFAULT_RECALL
            if (self.max_loss or found.get("max_loss")) is not None:
                found["max_recall_loss"] = DEFAULT_MAX_RECALL_LOSS
        else:
            found["recall"] = 0.0
        if self.max_error is not None:
            found["clusters"] = "elbow"
        elif (self.clusters or found.get("clusters")) == "elbow":
            paper = self.recipe == PAPER
            target = self.target or found["target"]
            found["max_error"] = 1.0 if paper else DEFAULT_MAX_ERROR.get(target, 1.0)
        return found


@dataclass(frozen=True, kw_only=True)
class Resolved(Settings):
    """Settings of one model, without what was left open: see `Settings.resolve`."""

    cost: str
    membership: str
    target: str
    window: int
    features: str
    blend: float
    recent: int | str
    sinks: int
    refit: str
    recall: float

    @property
    def streams(self) -> bool:
        """Whether heads may forget their far keys."""
        return self.context is not None

    @property
    def differentiated(self) -> bool:
        """Whether a backward pass is needed."""
        return self.cost == GRADIENT

    @property
    def refits(self) -> bool:
        """Whether output weights or biases are refit."""
        return self.refit != "none"

    @property
    def budgeted(self) -> bool:
        """Whether savings are dealt out to the layers, to meet a budget."""
        return any(each is not None for each in (self.max_loss, self.save, self.removed))

    @property
    def measures(self) -> bool:
        """Whether the loss of a budget is measured: if wanted, and always if it is bounded."""
        return self.max_loss is not None or (self.measure and self.budgeted)

    @property
    def asks_recall(self) -> bool:
        """Whether recall of facts is measured beside the loss."""
        return self.streams or self.max_recall_loss is not None

    @property
    def holds_out(self) -> bool:
        """Whether a part of the text is held out: to measure on, or to judge a refit by."""
        return self.measures or self.refits

    def recents(self, length: int) -> list[int]:
        """Every w that is tried on sequences of ``length`` tokens."""
        if isinstance(self.recent, int):
            return [self.recent]
        most = min(length, self.context or length) - self.sinks
        return [w for w in RECENTS if w < most] or [RECENTS[0]]

    def layer_counts(self, shape: ModelShape) -> list[int]:
        """Numbers of clusters a layer can have, ascending."""
        return cluster_counts(shape.heads, shape.kv_heads, self.target, self.tensor_parallel)

    def given_clusters(self, shape: ModelShape) -> list[int] | None:
        """Numbers of clusters as one per layer; None if they are not given."""
        if self.clusters is None or isinstance(self.clusters, str):
            return None
        if isinstance(self.clusters, int):
            return [self.clusters if free else shape.heads for free in shape.clusterable]
        return list(self.clusters)

    def problems(self, shape: ModelShape) -> Iterator[str]:
        """What is unknown, out of range or contradicts itself; what follows may be wrong, too."""
        yield from none_of("cost", self.cost, COSTS)
        yield from none_of("refit", self.refit, REFITS)
        if self.recipe == PAPER and (
            (self.cost, self.membership, self.refit) != (SCORES, ONLINE, "none") or self.recent
        ):
            yield "recipe paper is an online membership on scores: leave out the other options"
        auto = self.recent == AUTO and self.streams
        if isinstance(self.recent, str) and not auto:
            yield (
                f"recent is a number of tokens, or {AUTO} in recipes with streaming heads, not "
                f"{self.recent!r}"
            )
        yield from choice_problems(replace(self, recent=1) if auto else self)
        yield from target_problems(self.target, shape)
        if self.membership == BLEND and self.cost == SCORES:
            yield "membership blend needs cost gradient or value"
        if self.context is not None and not 1 <= self.context <= MOST_CONTEXT:
            yield f"context is a number of tokens, 1 to {MOST_CONTEXT}, not {self.context}"
        if not 0 <= self.recall <= MOST_RECALL:
            yield f"recall is a weight of at least 0, not {self.recall}"
        if self.recall and self.cost != GRADIENT:
            yield (
                "text to recall from is for gradient costs, which know whose loss counts: leave "
                "recall out, or use cost gradient"
            )
        yield from self._budget_problems(shape)
        yield from self._cluster_problems(shape)
        if self.tensor_parallel > 1:
            yield from self._rank_problems(shape)

    def _budget_problems(self, shape: ModelShape) -> Iterator[str]:
        budgets = ("clusters", "max_loss", "save", "removed")
        given = [name for name in budgets if getattr(self, name) is not None]
        if len(given) > 1:
            yield (
                f"{' and '.join(given)} contradict each other: give one of them"
                f"{' (max_error is of clusters)' * (self.clusters == 'elbow')}"
            )
        if self.max_recall_loss is not None and self.max_loss is None:
            yield "max_recall_loss goes with max_loss: give both, or none"
        recall = self.max_recall_loss
        if recall is not None and not 0 < recall <= 1:
            yield f"max_recall_loss is a share such as 0.05 for 5 points, not {recall}"
        if self.max_error is not None and not 0 <= self.max_error <= 1:
            yield f"max_error is a share of the error at k = 1, 0 to 1, not {self.max_error}"
        if self.max_loss is not None and not 0 < self.max_loss < 10:
            yield f"max_loss is a perplexity rise such as 0.01 for 1%, not {self.max_loss}"
        for name, share in (("save", self.save), ("removed", self.removed)):
            if share is not None and not 0 < share < 1:
                yield f"{name} is a share, more than 0 and less than 1, not {share}"
        grouped = shape.kv_heads < shape.heads
        if self.save is not None and self.target != K_BYTES and grouped and not self.streams:
            yield (
                "save needs target k-bytes in a grouped-query model: what clusters of query heads "
                "save cannot be chosen"
                if shape.kv_heads > 1
                else "save needs recipe default or stream in a model with one K/V head per layer: "
                "heads that share save none of its K,V bytes"
            )

    def _cluster_problems(self, shape: ModelShape) -> Iterator[str]:
        if isinstance(self.clusters, str) and self.clusters != "elbow":
            yield f"clusters is 'elbow', a number or one per layer, not {self.clusters!r}"
        wanted, counts = self.given_clusters(shape), self.layer_counts(shape)
        if wanted is not None and len(wanted) != shape.layers:
            yield f"{len(wanted)} numbers of clusters for {shape.layers} layers"
        for layer, (k, free) in enumerate(zip(wanted or (), shape.clusterable, strict=False)):
            possible = counts if free else counts[-1:]
            if k not in possible:
                listed = ", ".join(map(str, possible))
                yield f"layer {layer} cannot have {k} clusters; possible: {listed}"

    def _rank_problems(self, shape: ModelShape) -> Iterator[str]:
        ranks = self.tensor_parallel
        if problem := rank_problem(shape.heads, shape.kv_heads, ranks):
            yield f"tensor_parallel: {problem}"
        if self.streams:
            return
        if shape.kv_heads <= ranks:
            yield (
                f"tensor_parallel {ranks} leaves each rank one K/V head, whose K nobody can do "
                "without by sharing: use recipe default or stream"
            )
        if self.target == SCORES and shape.kv_heads < shape.heads:
            yield (
                "tensor_parallel needs target k-bytes in a grouped-query model: which K heads "
                "clusters of query heads leave to each rank cannot be chosen"
            )
