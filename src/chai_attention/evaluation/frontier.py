"""`frontier`: perplexity against K,V bytes saved, for several ways to calibrate one model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration.perplexity import Loss, paired_rise, token_loss
from chai_attention.calibration.texts import cut_sequences
from chai_attention.errors import CalibrationError
from chai_attention.evaluation.points import FrontierError, Point, PointFile, key_of
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress, quiet
from chai_attention.results import digest
from chai_attention.runtime.shape import ModelShape, describe

SAVE, REMOVED = "save", "removed"
TOKENS_PER_BATCH = 2048
PAPER = "paper"

_RECENT = {"recipe": "share", "recent": 32, "sinks": 4, "cost": "gradient"}
# name -> arguments of `calibrate`; each says what it needs, whatever calibration's defaults are
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"recipe": "default"},
    "stream": {"recipe": "stream"},
    "share": {"recipe": "share"},
    PAPER: {"recipe": "paper", "target": "scores"},
    "online": {"cost": "scores", "membership": "online", "recent": 0},
    "scores": {"cost": "scores", "membership": "static", "recent": 0},
    "value": {"cost": "value", "membership": "static", "recent": 0},
    "gradient": {"cost": "gradient", "membership": "static", "recent": 0},
    "blend": {"cost": "gradient", "membership": "blend", "recent": 0},
    "gradient+recent": {**_RECENT, "membership": "static"},
    "gradient+recent+refit": {**_RECENT, "membership": "static", "refit": "output"},
    "blend+recent": {**_RECENT, "membership": "blend"},
}

Recipe = Mapping[str, Any] | ClusterProfile
Refusal = Callable[[str, float, CalibrationError], None]


def recipes_named(names: Sequence[str]) -> dict[str, Recipe]:
    """Return the recipes of these names.

    A name that ends in ``.json`` is a profile's file; the single name "all" stands for every
    recipe.

    Raises:
        FrontierError: an unknown name.
        ProfileError: a file that is no profile.
    """
    recipes: dict[str, Recipe] = {}
    for name in RECIPES if list(names) == ["all"] else names:
        if name in RECIPES:
            recipes[name] = RECIPES[name]
        elif name.endswith(".json"):
            recipes[name] = ClusterProfile.load(name)
        else:
            raise FrontierError(
                f"no recipe {name!r}: give a profile's file (.json) or some of {', '.join(RECIPES)}"
            )
    return recipes


def for_bytes(recipes: Mapping[str, Recipe], shape: ModelShape) -> dict[str, Recipe]:
    """Return the recipes with the paper's made able to save a share of K,V bytes.

    In a grouped-query model clusters of query heads free K by chance only, so there the paper's
    features, window and layer-wise bound choose whole K/V heads.
    """
    if PAPER not in recipes or not 1 < shape.kv_heads < shape.heads:
        return dict(recipes)
    return {**recipes, PAPER: {"recipe": "paper", "target": "k-bytes"}}


def for_context(
    recipes: Mapping[str, Recipe], tokens: int, recall: float | None = None
) -> dict[str, Recipe]:
    """Return the recipes, those with streaming heads made to save bytes of so many tokens.

    With ``recall``, these also learn from facts to recall with that weight.
    """
    extra: dict[str, Any] = {} if recall is None else {"recall": recall}
    return {
        name: {"context": tokens, **extra, **recipe} if _streams(recipe) else recipe
        for name, recipe in recipes.items()
    }


def require_streaming(recipes: Mapping[str, Recipe], asked: Sequence[str]) -> None:
    """Refuse options of recipes with streaming heads where there is none.

    Raises:
        FrontierError: names the options.
    """
    if asked and not any(map(_streams, recipes.values())):
        raise FrontierError(
            f"no recipe has streaming heads, for which {' and '.join(asked)} would be: leave that "
            "out, or take recipe default or stream, too"
        )


def _streams(recipe: Recipe) -> TypeGuard[Mapping[str, Any]]:
    """Whether heads may forget their far keys, which is chosen for a context, and by recall."""
    return isinstance(recipe, Mapping) and recipe.get("recipe") in ("default", "stream")


def for_ranks(recipes: Mapping[str, Recipe], ranks: Sequence[int]) -> dict[str, Recipe]:
    """Return the recipes, each for every one of these numbers of tensor-parallel ranks.

    Files of profiles stay as they are.
    """
    made: dict[str, Recipe] = {}
    for name, recipe in recipes.items():
        if not isinstance(recipe, Mapping) or list(ranks) == [1]:
            made[name] = recipe
            continue
        for count in ranks:
            several = {"tensor_parallel": count} if count > 1 else {}
            made[f"{name}, {count} ranks" if several else name] = {**recipe, **several}
    return made


@dataclass(frozen=True)
class _Test:
    """Windows ``[N, context]`` of one text."""

    name: str
    context: int
    windows: Tensor
    digest: str


@dataclass(frozen=True)
class FrontierTexts:
    """Texts to measure on, and how they are cut.

    Attributes:
        windows: name -> windows of tokens ``[N, S]`` int64.
        contexts: context lengths, tokens; None for the width of each text's windows.
        before: tokens that every window begins with, such as a beginning-of-sequence token: the
            shorter windows that are cut from it begin with them too.
    """

    windows: Mapping[str, Tensor]
    contexts: Sequence[int] | None = None
    before: Sequence[int] = ()

    def cut(self) -> list[_Test]:
        """Every text cut to every context length.

        Raises:
            FrontierError: contexts or texts that cannot be used.
        """
        if not self.windows or (self.contexts is not None and not self.contexts):
            raise FrontierError("a frontier needs at least one test text and one context length")
        tests = []
        for name, windows in self.windows.items():
            if windows.ndim != 2 or windows.dtype != torch.long:
                raise FrontierError(
                    f"test text {name}: windows are a [N, S] int64 tensor of token ids"
                )
            width = windows.shape[1]
            for context in dict.fromkeys([width] if self.contexts is None else self.contexts):
                if not 2 <= context <= width:
                    raise FrontierError(
                        f"test text {name}: a context is 2 to {width} tokens, the width of its "
                        f"windows, not {context}"
                    )
                try:
                    cut = cut_sequences(windows, context, self.before)
                except CalibrationError as error:
                    raise FrontierError(str(error)) from error
                if len(cut) < 2:
                    raise FrontierError(
                        f"test text {name} has one window of {context} tokens: the error of a "
                        "measurement needs two or more"
                    )
                tests.append(_Test(name, context, cut, digest_of(cut)))
        return tests


def frontier(
    model: PreTrainedModel,
    recipes: Mapping[str, Recipe],
    budgets: Sequence[float],
    texts: FrontierTexts,
    *,
    calibrate_one: Callable[..., ClusterProfile],
    asked: str = SAVE,
    kept: PointFile | None = None,
    on_refusal: Refusal | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress = quiet,
) -> list[Point]:
    """Measure what every recipe costs at every budget, on every text and context length.

    A profile is made once per recipe and budget and measured at all context lengths. All of them
    score the same test tokens: windows are cut into shorter ones. The model without clusters is
    scored once per text and length, and the rise is paired window by window.

    Args:
        model: a supported causal language model, without clustered heads.
        recipes: name -> arguments of ``calibrate_one``, or a ready profile, which is measured once
            whatever the budgets.
        budgets: shares to ask for, above 0 and below 1.
        texts: that calibration has not seen.
        calibrate_one: called with a recipe's arguments and the budget as ``save=`` or
            ``removed=``; returns a profile. Usually `calibrate` with model and text bound.
        asked: what budgets are shares of: "save", of the K,V bytes, or "removed", of the heads.
        kept: the file to which every point is written as it comes, about this model, calibration
            text and seed. Points that it holds are not measured again.
        on_refusal: called with (recipe, budget, error) if a calibration cannot do what is asked,
            which is then left out; None raises the error.
        tokens_per_batch: of a forward, unless one window has more.
        progress: called with (what is going on, points done, points in all).

    Returns:
        The points asked for, by recipe, budget, text and context.

    Raises:
        FrontierError: budgets, contexts or texts that cannot be used.
        CalibrationError: from ``calibrate_one``, without ``on_refusal``.
    """
    if asked not in (SAVE, REMOVED):
        raise FrontierError(f"budgets are shares of {SAVE} or {REMOVED}, not of {asked!r}")
    tries = _tries(recipes, budgets)
    bench = _Bench(model, texts.cut(), tokens_per_batch)
    kept = PointFile(None, {}) if kept is None else kept
    total = len(tries) * len(bench.tests)
    points: list[Point] = []
    for number, (name, recipe, budget) in enumerate(tries):
        head = (name, _settings(recipe), None if budget is None else asked, budget)
        keys = [key_of(*head, item.name, item.digest, item.context) for item in bench.tests]
        missing = [
            item for item, key in zip(bench.tests, keys, strict=True) if kept.get(key) is None
        ]
        what = name if budget is None else f"{name} at {budget:.1%}"
        done = number * len(bench.tests)
        if missing:
            progress(f"calibrating {what}", done, total)
            start, seconds = time.perf_counter(), 0.0
            try:
                if isinstance(recipe, ClusterProfile):
                    profile = recipe
                else:
                    profile = calibrate_one(**{asked: budget}, **recipe)
                    seconds = time.perf_counter() - start
            except CalibrationError as error:
                if on_refusal is None or budget is None:
                    raise
                on_refusal(name, budget, error)
                missing = []
            for item in missing:
                progress(f"perplexity of {what} at {item.context} tokens", done, total)
                kept.add(Point(*head, **bench.measure(profile, item), seconds=seconds))
        points += [point for key in keys if (point := kept.get(key)) is not None]
    progress("done", total, total)
    return points


class _Bench:
    """Scores profiles of one model; the model without clusters once per test."""

    def __init__(self, model: PreTrainedModel, tests: Sequence[_Test], tokens_per_batch: int):
        self.tests = tests
        self._tokens = tokens_per_batch
        self._model = model
        self._shape = describe(model)
        self._baselines: dict[tuple[str, int], Loss] = {}

    def measure(self, profile: ClusterProfile, test: _Test) -> dict[str, Any]:
        """The fields of a point that are found, not asked for, and those of its test."""
        place = test.name, test.context
        if place not in self._baselines:
            self._baselines[place] = self._loss(test)
        with enabled(self._model, profile):
            rise = paired_rise(self._baselines[place], self._loss(test))
        if not math.isfinite(rise.rise):
            raise FrontierError(
                f"the perplexity on {test.name} is not a number: run the model in float32"
            )
        heads = self._shape.heads
        return {
            "text": test.name,
            "digest": test.digest,
            "context": test.context,
            "windows": len(test.windows),
            "removed": 1 - sum(profile.clusters) / (heads * self._shape.layers),
            "saved": profile.saved(self._shape, test.context),
            "at_least": profile.keeps_at_most(self._shape),
            "baseline": self._baselines[place].perplexity,
            "rise": rise.rise,
            "standard_error": rise.standard_error,
        }

    def _loss(self, test: _Test) -> Loss:
        batch = max(1, self._tokens // test.context)
        return token_loss(self._model, test.windows, batch_size=batch)


def _tries(
    recipes: Mapping[str, Recipe], budgets: Sequence[float]
) -> list[tuple[str, Recipe, float | None]]:
    """Every recipe with every budget; ready profiles once, without."""
    if not recipes:
        raise FrontierError("a frontier needs at least one recipe")
    bad = [budget for budget in budgets if not 0 < budget < 1]
    if bad:
        raise FrontierError(f"a budget is a share above 0 and below 1, not {bad[0]:g}")
    tries: list[tuple[str, Recipe, float | None]] = []
    for name, recipe in recipes.items():
        if isinstance(recipe, ClusterProfile):
            tries.append((name, recipe, None))
            continue
        if not budgets:
            raise FrontierError(f"recipe {name} needs at least one budget")
        tries += [(name, recipe, budget) for budget in dict.fromkeys(budgets)]
    return tries


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe's name stands for, in a file."""
    if isinstance(recipe, ClusterProfile):
        return {"profile": digest(recipe.to_json(), digits=12)}
    return dict(recipe)


def digest_of(windows: Tensor) -> str:
    """Return a short digest of windows of tokens, which tells two texts of one name apart."""
    return digest(windows, digits=12)
