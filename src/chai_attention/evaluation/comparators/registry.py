"""Make and fit comparators by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.errors import EvaluationError, UnsupportedModelError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.comparators.chai import RECIPES, Chai
from chai_attention.evaluation.comparators.dejavu import DejaVu
from chai_attention.evaluation.comparators.float8 import Float8
from chai_attention.evaluation.comparators.head_predictor import HeadPredictors
from chai_attention.evaluation.comparators.mha import Mha
from chai_attention.evaluation.comparators.random_heads import RandomHeads
from chai_attention.evaluation.comparators.spatten import VARIANTS, SpAtten
from chai_attention.evaluation.comparators.streaming import MassStream, RandomStream
from chai_attention.evaluation.profiled import NO_PROFILE, PROFILE, Profiled
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress, quiet
from chai_attention.runtime.shape import describe

# percent of heads that DejaVu leaves out
_DEJAVU = {f"dejavu-{percent}": percent / 100 for percent in (10, 30, 50)}
_ORACLE = {name.replace("-", "-oracle-"): share for name, share in _DEJAVU.items()}
_STREAM = ("random-stream", "mass-stream")
_KVPRESS, _DUO = ("think", "snapkv"), "duo"
_QUANTISED = ("quant8", "quant4", "chai+quant8", "chai+quant4")
_PACKAGE = "chai_attention.evaluation.comparators"

EXTERNAL: tuple[str, ...] = (*_KVPRESS, _DUO, *_QUANTISED)
"""Comparators by libraries of the extra ``baselines``."""

_FLOAT8 = ("float8", "chai+float8")

NAMES: tuple[str, ...] = (
    *("mha", *RECIPES, "random", *_STREAM, *_DEJAVU, *_ORACLE, *VARIANTS, *_FLOAT8),
    *EXTERNAL,
)
"""Comparators that need nothing but a model and text; "profile" is one more, given a profile."""


def available(
    profile: ClusterProfile | None = None, model: PreTrainedModel | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what "all" stands for here, and one message for each comparator left out.

    Left out are those of the extra ``baselines`` whose library is missing, or cannot run ``model``.

    Args:
        profile: with one, "profile" is among them.
        model: a causal language model; None to look at the libraries alone.
    """
    names = [PROFILE] if profile is not None else []
    left_out = []
    for name in NAMES:
        try:
            if name in EXTERNAL:
                found = _external(name, None, None)
                if model is not None:
                    found.prepare(model, ())
        except (EvaluationError, UnsupportedModelError) as error:
            left_out.append(f"without {name}: {error}")
        else:
            names.append(name)
    return tuple(names), tuple(left_out)


def comparators(
    names: Sequence[str],
    *,
    model: PreTrainedModel,
    tokens: Sequence[Tensor],
    profile: ClusterProfile | None = None,
    save: float | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = quiet,
) -> dict[str, Comparator]:
    """Make comparators and fit those that learn from text.

    Args:
        names: some of `NAMES`, or "profile"; the single name "all" stands for those `available`.
        model: a causal language model, not enabled.
        tokens: calibration windows, each ``[S]`` int64 and of one length.
        profile: of the comparator "profile"; "random" takes its numbers of heads, streaming heads
            its bytes and window, and CHAI beside a quantised cache its clusters. Without one, all
            take that of "default".
        save: share of the K,V bytes per token to save, for all that have such a budget. None: what
            the profile saves; without a profile either, each method's own default.
        seed: of everything random.
        tokenizer: of the model, with which facts to recall are hidden in the windows that
            "default" learns from; None for none.
        progress: called with (what is going on, done, in all).

    Returns:
        Comparators by name, in the order of ``names``; the same arguments give the same ones.

    Raises:
        EvaluationError: an unknown name, "profile" without a profile, a saving that a method
            cannot reach, or a library that is missing.
        CalibrationError: from calibrations, which cannot do what is asked.
        UnsupportedModelError: a model that a method cannot run.
    """
    chosen = available(profile, model)[0] if list(names) == ["all"] else tuple(dict.fromkeys(names))
    known = (*NAMES, PROFILE)
    if unknown := [name for name in chosen if name not in known]:
        raise EvaluationError(f"no comparator {', '.join(unknown)}: choose from {', '.join(known)}")
    if profile is not None:
        profile.check(describe(model))
        save = save or profile.saved(describe(model), 10**9) or None
    made = _Factory(model, tokens, profile, save, seed, tokenizer, progress)
    found = {}
    for number, name in enumerate(chosen):
        progress(f"preparing {name}", number, len(chosen))
        found[name] = made(name)
    return found


@dataclass
class _Factory:
    """Makes comparators of one model; what several of them share is made once."""

    model: PreTrainedModel
    tokens: Sequence[Tensor]
    given: ClusterProfile | None
    save: float | None
    seed: int
    tokenizer: PreTrainedTokenizerBase | None
    progress: Progress

    def __call__(self, name: str) -> Comparator:
        if name == "default":
            return self._default
        made = self._make(name)
        made.prepare(self.model, self.tokens, self.progress)
        return made

    def _make(self, name: str) -> Comparator:
        if name == "mha":
            return Mha()
        if name == PROFILE:
            if self.given is None:
                raise EvaluationError(NO_PROFILE)
            return Profiled(self.given)
        if name in RECIPES:
            return Chai(name, self.save, self.seed, self.tokenizer)
        if name == "random":
            return RandomHeads(self._profile, self.seed)
        if name in _STREAM:
            return self._streaming(name)
        if name in _DEJAVU:
            return DejaVu(_DEJAVU[name], self._predictors)
        if name in _ORACLE:
            return DejaVu(_ORACLE[name], None)
        if name in VARIANTS:
            return SpAtten(name, self.save)
        clusters = self._profile if name.startswith("chai+") else None
        if name in _FLOAT8:
            return Float8(clusters)
        return _external(name, self.save, clusters)

    def _streaming(self, name: str) -> Comparator:
        """Streaming heads at the bytes and with the window of the profile, where there is one."""
        profile = self.given if self.given is not None or self.save else self._profile
        save = self.save or (profile and profile.saved(describe(self.model), 10**9))
        if not save:
            raise EvaluationError(f"{name} takes what the profile saves, which is nothing: --save")
        local = (profile.recent, profile.sinks) if profile and profile.recent else None
        if name == "mass-stream":
            return MassStream(save, local)
        return RandomStream(save, local, self.seed)

    @cached_property
    def _predictors(self) -> HeadPredictors:
        return HeadPredictors(self.seed)

    @cached_property
    def _default(self) -> Chai:
        made = Chai("default", self.save, self.seed, self.tokenizer)
        made.prepare(self.model, self.tokens, self.progress)
        return made

    @property
    def _profile(self) -> ClusterProfile:
        return self._default.profile if self.given is None else self.given


def _external(name: str, save: float | None, profile: ClusterProfile | None) -> Comparator:
    """Make a comparator of the extra ``baselines``, whose libraries are loaded only here.

    Raises:
        EvaluationError: its library is not installed.
    """
    try:
        made: Comparator
        if name in _KVPRESS:
            made = import_module(f"{_PACKAGE}.kvpress").kvpress_comparator(name, save)
        elif name == _DUO:
            made = import_module(f"{_PACKAGE}.duo").Duo(save)
        else:
            import_module("hqq.core.quantize")
            made = import_module(f"{_PACKAGE}.quantised").Quantised(int(name[-1]), profile)
    except ImportError as error:
        raise EvaluationError(
            f"{name} needs {error.name}: pip install 'chai-attention[baselines]'"
        ) from error
    return made
