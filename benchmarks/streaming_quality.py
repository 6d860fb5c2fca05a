"""What it costs to share and to forget far keys: frontiers, the promise on unseen text, recall.

usage: python benchmarks/streaming_quality.py MODEL --text calibration.txt --test test.txt
       --out folder/ [--parts frontier promise recall] [--contexts 256,1024,2048]
       [--recall 1024,2048,4096] [--dtype bfloat16]

Evidence is collected once for everything, and kept in the folder. Every point, row and part is
written when it is there, and what is there is not measured again: the same command goes on.
``--seconds`` ends the run before the next part or row. ``--dtype`` is what promises on unseen text
and recall are measured in; evidence and frontiers are in float32.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai_attention.calibration import calibrate, evidence_file, load_texts, windows_of
from chai_attention.calibration.data import read_data, stretches
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.evidence_file import EvidenceFile
from chai_attention.calibration.perplexity import paired_rise, token_loss
from chai_attention.calibration.recall_score import recall_score
from chai_attention.calibration.recall_source import use_recall
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.texts import beginning
from chai_attention.errors import CalibrationError, ChaiError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.frontier import (
    RECIPES,
    FrontierTexts,
    digest_of,
    for_context,
    frontier,
)
from chai_attention.evaluation.points import PointFile
from chai_attention.evaluation.recall_tasks import recall_sources, recall_text
from chai_attention.evaluation.tasks import TaskSource
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.loading import load_model
from chai_attention.profile import FOR_EVER, ClusterProfile
from chai_attention.results import write_result
from chai_attention.runtime.shape import describe
from parts import Parts

NAMES = ("default", "share", "stream")
EXTERNAL = ("snapkv", "think")
PARTS = ("frontier", "promise", "recall")
LEARNT, HELD_OUT, LENGTH = 64, 64, 1024
FULL = "full model"


class Bench:
    """One model with its texts and evidence."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.begin = time.perf_counter()
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer = load_model(options.model, "float32", options.device)
        self.shape = describe(self.model)
        self.before = beginning(self.tokenizer)
        documents = load_texts(options.text, tokens=400_000)

        def read(count: int, length: int) -> tuple[Tensor, None]:
            return windows_of(documents, self.tokenizer, count, length, options.seed), None

        self.length = options.length
        times = stretches(self.model, Settings().resolve(self.shape), self.length)
        data = read_data(read, options.samples, options.held_out, self.length, times, self.before)
        assert data.held_out is not None
        self.windows, self.check = data.sequences, data.held_out
        self.longer = data.held_out if data.longer is None else data.longer
        self.say(f"{len(self.windows)} windows to learn from, {len(self.check)} held out")

    @cached_property
    def measured_model(self) -> PreTrainedModel:
        """The model in the dtype of promises and recall."""
        if self.options.dtype == "float32":
            return self.model
        return load_model(self.options.model, self.options.dtype, self.options.device)[0]

    @cached_property
    def store(self) -> EvidenceStore:
        """Evidence for every recipe and context, collected at once or read."""
        about = self.about() | {"recall weight": None, "windows": digest_of(self.windows)}
        evidence_file.EVERY = 0.0  # whole passes, too, are kept for the next run
        file = EvidenceFile(self.options.evidence or self.out / "evidence.safetensors", about)
        store = EvidenceStore(self.model, self.windows, self.options.batch, file)
        contexts = [*self.options.contexts, LENGTH]
        settings = Settings(
            context=max(contexts), recall=1.0, seed=self.options.seed
        ).resolve(self.shape)  # fmt: skip
        self.say(str(use_recall(store, self.tokenizer, settings, required=False)))
        store.get_all(settings)
        self.say("evidence is there")
        return store

    def say(self, what: str) -> None:
        """Tell how far it is."""
        print(f"[{time.perf_counter() - self.begin:.0f} s] {what}", flush=True)

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() - self.begin > self.options.seconds

    def part(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure a part and write it, unless it is there or the time is up."""
        path = self.out / f"{name}.json"
        if path.exists() or self.late:
            return
        self.write(path, measure())
        self.say(f"{name} done")

    def write(self, path: Path, what: Any) -> None:
        """Write JSON, whole or not at all."""
        write_result(path, what, ChaiError)

    def calibrated(self, **settings: Any) -> ClusterProfile:
        """A profile of the calibration windows."""
        if self.options.weight is not None and settings.get("recipe") != "share":
            settings = {"recall": self.options.weight} | settings
        longer = [self.longer] if self.longer.shape[1] > self.length else []
        return calibrate(
            self.model, self.tokenizer, self.windows, samples=len(self.windows), length=self.length,
            held_out=[self.check, *longer], store=self.store, seed=self.options.seed,
            source=Path(self.options.text).name, **settings,
        )  # fmt: skip

    def frontier(self, context: int) -> None:
        """Every recipe at every budget, chosen for a context and measured there."""
        if self.late:
            return
        test = windows_of(
            load_texts(self.options.test, tokens=400_000), self.tokenizer, self.options.windows,
            max(self.options.contexts), self.options.seed,
        )  # fmt: skip
        names = self.options.recipes or NAMES
        recipes = for_context({name: RECIPES[name] for name in names}, context, self.options.weight)
        frontier(
            self.model, recipes, self.options.budgets,
            FrontierTexts({Path(self.options.test).name: test}, [context], self.before),
            calibrate_one=partial(
                calibrate, self.model, self.tokenizer, self.windows, samples=len(self.windows),
                length=self.length, held_out=self.check, measure=False, store=self.store,
                seed=self.options.seed,
            ),
            kept=PointFile(self.out / f"frontier-{context}.json", self.about()),
            tokens_per_batch=self.options.tokens,
            on_refusal=lambda name, budget, error: self.say(f"{name} at {budget:.0%}: {error}"),
        )  # fmt: skip
        self.say(f"frontier at {context} done")

    def about(self) -> dict[str, Any]:
        """What every result is of."""
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        return {
            "model": Path(self.options.model).name,
            "hardware": name,
            "dtype": "float32",
            "calibration": [Path(self.options.text).name, len(self.windows), self.length],
            "test": Path(self.options.test).name,
            "recall weight": self.options.weight,
            "seed": self.options.seed,
        }

    def promise(self, recipe: str) -> dict[str, Any]:
        """What `--max-loss 1%` finds, and what it costs on text that calibration never saw."""
        start = time.perf_counter()
        profile = self.promised(recipe)
        seconds = time.perf_counter() - start
        rises = []
        for path in (self.options.test, *self.options.other):
            documents = load_texts(path, tokens=400_000)
            for length in dict.fromkeys((self.length, self.longer.shape[1])):
                try:
                    text = windows_of(
                        documents, self.tokenizer, 96 * LENGTH // length, length, self.options.seed
                    )
                except CalibrationError:
                    continue
                if len(text) < 4:
                    continue
                rises.append(
                    {"text": Path(path).name, "length": length, "windows": len(text)}
                    | self.rise(profile, text)
                )
        return {
            "about": self.about() | {"dtype of unseen text": self.options.dtype},
            "recipe": recipe,
            "recent": profile.recent,
            "seconds": round(seconds, 1),
            "promise": dict(profile.promise or {}),
            "saved per token": profile.saved(self.shape, FOR_EVER),
            "unseen": rises,
        }

    def promised(self, recipe: str) -> ClusterProfile:
        """The profile that `--max-loss 1%` finds."""
        path = self.out / f"profile-{recipe}.json"
        if not path.exists():
            self.calibrated(recipe=recipe, max_loss=self.options.max_loss).save(path)
            self.say(f"{recipe} within {self.options.max_loss:.1%} found")
        return ClusterProfile.load(path)

    def rise(self, profile: ClusterProfile, text: Tensor) -> dict[str, float]:
        """What a profile costs and saves on windows of text."""
        model, batch = self.measured_model, max(1, self.options.tokens // text.shape[1])
        plain = token_loss(model, text, batch_size=batch)
        with enabled(model, profile):
            found = paired_rise(plain, token_loss(model, text, batch_size=batch))
        return {
            "saved": profile.saved(self.shape, text.shape[1]),
            "rise": found.rise,
            "standard error": found.standard_error,
        }

    def recall(self) -> None:
        """Exact answers and their likelihood, row by row (see `Recall`)."""
        rows = Recall(self)
        rows.row(FULL, lambda: None)
        budget = f"{self.options.max_loss:.0%} promised"
        for recipe in ("default", "share"):
            rows.row(f"{recipe}, {budget}", partial(self.promised, recipe))
        for external in self.options.external:
            rows.row(
                f"{external}, bytes of default, {budget}",
                partial(self.promised, "default"),
                external,
            )
        for save in self.options.curve:
            for name in self.options.curve_methods:
                recipe = "default" if name in EXTERNAL else name
                rows.row(
                    f"{name}, {save:.0%} saved",
                    partial(self.calibrated, recipe=recipe, save=save, measure=False),
                    name if name in EXTERNAL else None,
                )
            for weight in self.options.curve_weights:
                rows.row(
                    f"default, recall {weight:g}, {save:.0%} saved",
                    partial(self.calibrated, save=save, recall=weight, measure=False),
                )


class Recall:
    """The file of recall's rows, one for each method and task."""

    def __init__(self, bench: Bench):
        options = bench.options
        self.bench = bench
        about = bench.about() | {"dtype": options.dtype, "cases": options.cases}
        self.file = Parts(bench.out / f"recall-{options.dtype}.json", about)
        self.sources = recall_sources(
            bench.model, bench.tokenizer, recall_text(), options.recall, options.cases, options.seed
        )
        self.rows: list[dict[str, Any]] = self.file.found.get("rows", [])

    def row(
        self, name: str, make: Callable[[], ClusterProfile | None], external: str | None = None
    ) -> None:
        """Measure a method at every missing task; another library's at the profile's bytes."""
        done = {row["task"] for row in self.rows if row["method"] == name}
        missing = [source for source in self.sources if source.name not in done]
        if not missing:
            return
        if self.bench.late:
            self.bench.say(f"no time for recall of {name}")
            return
        try:
            profile = make()
            for source in missing:
                self.rows.append(self.measured(name, source, profile, external))
                self.file.add("rows", self.rows)
        except (ChaiError, ImportError) as error:
            self.bench.say(f"left out: recall of {name}: {error}")
            return
        self.bench.say(f"recall of {name}")

    def measured(
        self, name: str, source: TaskSource, profile: ClusterProfile | None, external: str | None
    ) -> dict[str, Any]:
        """One method at one task; differences are to the full model, paired by cases."""
        bench, start = self.bench, time.perf_counter()
        model, cases = bench.measured_model, source.cases
        length = len(cases[0].prompt) + len(cases[0].answer)
        saved = 0.0 if profile is None else profile.saved(bench.shape, length)
        context: AbstractContextManager[None] = nullcontext()
        method: Comparator | None = None
        if external is not None:
            from chai_attention.evaluation.comparators.kvpress import kvpress_comparator

            method = kvpress_comparator(external, saved)
            method.prepare(model, ())
            saved = 1 - method.kv_share(model, length)
            context = method.attached(model)
        elif profile is not None:
            context = enabled(model, profile)
        with context:
            correct, nll = recall_score(
                model, cases, method=method, batch_size=bench.options.rows,
                most_tokens=bench.options.tokens,
            )  # fmt: skip
        row = {
            "method": name,
            "task": source.name,
            "cases": len(cases),
            "correct": int(correct.sum()),
            "nll": float(nll.mean()),
            "saved": saved,
            "saved per token": profile and profile.saved(bench.shape, FOR_EVER),
            "seconds": round(time.perf_counter() - start, 2),
            "answers": "".join("01"[int(x)] for x in correct),
            "nlls": [round(float(x), 4) for x in nll],
        }
        return row | self.differences(row)

    def differences(self, row: dict[str, Any]) -> dict[str, float]:
        """Of a row and the full model's: means over the cases with their standard errors."""
        plain = [r for r in self.rows if r["method"] == FULL and r["task"] == row["task"]]
        if not plain:
            return {}
        found = {}
        for what, values in (("difference", "answers"), ("nll difference", "nlls")):
            pairs = zip(row[values], plain[0][values], strict=True)
            change = torch.tensor([float(now) - float(before) for now, before in pairs])
            found[what] = float(change.mean())
            found[f"{what} error"] = float(change.std() / len(change) ** 0.5)
        return found


def bench_parser(doc: str) -> argparse.ArgumentParser:
    """The options of `Bench` itself, for scripts that measure with one.

    Args:
        doc: of the script; its first line says what it is.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add = parser.add_argument
    add("model")
    add("--text", required=True)
    add("--test", required=True)
    add("--out", type=Path, required=True)
    add("--device", default="auto")
    add("--samples", type=int, default=LEARNT, help="windows to learn from")
    add("--held-out", type=int, default=HELD_OUT)
    add("--length", type=int, default=LENGTH)
    add("--batch", type=int, default=8, help="windows of a forward for evidence")
    add("--weight", type=float, help="of text to recall from; 0 for none")
    add("--contexts", type=_numbers, default=[1024, 2048])
    add("--evidence", type=Path, help="file that keeps it, shared by several --out")
    add("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Measure all parts."""
    parser = bench_parser(__doc__)
    add = parser.add_argument
    add("--other", nargs="*", default=[])
    add("--parts", nargs="*", choices=PARTS, default=PARTS)
    add("--dtype", default="float32", help="of promises on unseen text, and of recall")
    add("--tokens", type=int, default=16384, help="of a forward, when something is measured")
    add("--windows", type=int, default=32, help="of test text, of the longest context")
    add("--budgets", type=_shares, default=[x / 100 for x in range(10, 90, 10)])
    add("--recipes", nargs="*", help="of frontiers and promises")
    add("--max-loss", type=float, default=0.01)
    add("--recall", type=_numbers, default=[1024, 2048, 4096], help="lengths")
    add("--cases", type=int, default=100)
    add("--rows", type=int, default=16, help="cases of a forward, at most")
    add("--external", nargs="*", choices=EXTERNAL, default=EXTERNAL)
    add("--curve", type=_shares, default=[0.2, 0.3, 0.4, 0.5])
    add("--curve-methods", nargs="*", choices=(*NAMES, *EXTERNAL), default=["default"])
    add("--curve-weights", nargs="*", type=float, default=[], help="of recall, to compare")
    add("--seconds", type=float, default=float("inf"))
    bench = Bench(parser.parse_args())
    parts = bench.options.parts
    if "recall" in parts:
        bench.recall()
    if "frontier" in parts:
        for context in bench.options.contexts:
            bench.frontier(context)
    if "promise" in parts:
        for recipe in bench.options.recipes or NAMES:
            bench.part(f"promise-{recipe}", partial(bench.promise, recipe))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _shares(text: str) -> list[float]:
    return [float(part) / 100 for part in text.split(",") if part]


if __name__ == "__main__":
    main()
