"""What it costs to share and to forget far keys: frontiers, the promise on unseen text, recall.

usage: python benchmarks/streaming_quality.py MODEL --text calibration.txt --test test.txt
       --out folder/ [--other other.txt ...] [--contexts 1024,2048] [--recall 1024,2048,4096]

Evidence is collected once for everything. Every part is written when it is there, and a part whose
file is there is not measured again; ``--seconds`` ends the run before the next part.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chai_attention.calibration import calibrate, load_texts, windows_of
from chai_attention.calibration.calibrate import stretched
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.held_out import spread
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.texts import beginning, cut_windows
from chai_attention.errors import CalibrationError
from chai_attention.evaluation.frontier import RECIPES, for_context, frontier
from chai_attention.evaluation.perplexity import paired_rise, token_loss
from chai_attention.evaluation.recall_score import recall_score
from chai_attention.evaluation.recall_tasks import recall_sources, recall_text
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.loading import load_model
from chai_attention.integrations.transformers.support import describe
from chai_attention.profile import FOR_EVER, ClusterProfile

NAMES = ("default", "stream", "share")
LEARNT, HELD_OUT, LENGTH, SINKS = 64, 64, 1024, 4
RECALL_BUDGETS = (0.2, 0.3, 0.4, 0.5)


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

        def read(count: int, length: int) -> torch.Tensor:
            return windows_of(documents, self.tokenizer, count, length, options.seed)

        resolved = Settings().resolve(self.shape)
        windows, times = stretched(self.model, resolved, read, options.samples, HELD_OUT, LENGTH)
        held = min(HELD_OUT // times, len(windows) // 2)
        windows, self.longer = spread(windows, held)
        self.windows = cut_windows(windows, LENGTH, self.before)
        self.check = cut_windows(self.longer, LENGTH, self.before)
        self.store = EvidenceStore(self.model, self.windows, 8)
        self.say(f"{len(self.windows)} windows to learn from, {len(self.check)} held out")

    def say(self, what: str) -> None:
        """Tell how far it is."""
        print(f"[{time.perf_counter() - self.begin:.0f} s] {what}", flush=True)

    def part(self, name: str, measure: Any) -> None:
        """Measure a part and write it, unless it is there or the time is up."""
        path = self.out / f"{name}.json"
        if path.exists() or time.perf_counter() - self.begin > self.options.seconds:
            return
        found = measure()
        path.write_text(json.dumps(found, indent=1) + "\n")
        self.say(f"{name} done")

    def calibrated(self, **settings: Any) -> ClusterProfile:
        """A profile of the calibration windows."""
        return calibrate(
            self.model, self.tokenizer, self.windows, samples=len(self.windows), length=LENGTH,
            held_out=self.check, longer=self.longer, store=self.store, seed=self.options.seed,
            source=Path(self.options.text).name, **settings,
        )  # fmt: skip

    def frontier(self, context: int) -> None:
        """Every recipe at every budget, chosen for a context and measured there and at others."""
        if time.perf_counter() - self.begin > self.options.seconds:
            return
        longest = max(self.options.contexts)
        test = windows_of(
            load_texts(self.options.test, tokens=400_000), self.tokenizer, self.options.windows,
            longest, self.options.seed,
        )  # fmt: skip
        names = self.options.recipes or NAMES
        recipes = for_context({name: RECIPES[name] for name in names}, context)
        frontier(
            self.model, recipes, self.options.budgets, {Path(self.options.test).name: test},
            calibrate_one=partial(
                calibrate, self.model, self.tokenizer, self.windows, samples=len(self.windows),
                length=LENGTH, held_out=self.check, measure=False, store=self.store,
            ),
            contexts=[context], before=self.before, file=self.out / f"frontier-{context}.json",
            about=self.about(),
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
            "calibration": [Path(self.options.text).name, len(self.windows), LENGTH],
            "test": Path(self.options.test).name,
            "seed": self.options.seed,
        }

    def promise(self, recipe: str) -> dict[str, Any]:
        """What `--max-loss 1%` finds, and what it costs on text that calibration never saw."""
        start = time.perf_counter()
        profile = self.calibrated(recipe=recipe, max_loss=0.01)
        seconds = time.perf_counter() - start
        profile.save(self.out / f"profile-{recipe}.json")
        rises = []
        for path in (self.options.test, *self.options.other):
            documents = load_texts(path, tokens=400_000)
            for length in dict.fromkeys((LENGTH, self.longer.shape[1])):
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
            "about": self.about(),
            "recipe": recipe,
            "recent": profile.recent,
            "seconds": round(seconds, 1),
            "promise": dict(profile.promise or {}),
            "saved per token": profile.saved(self.shape, FOR_EVER),
            "unseen": rises,
        }

    def rise(self, profile: ClusterProfile, text: torch.Tensor) -> dict[str, float]:
        """What a profile costs and saves on windows of text."""
        batch = max(1, 8192 // text.shape[1])
        plain = token_loss(self.model, text, batch_size=batch)
        with enabled(self.model, profile):
            found = paired_rise(plain, token_loss(self.model, text, batch_size=batch))
        return {
            "saved": profile.saved(self.shape, text.shape[1]),
            "rise": found.rise,
            "standard error": found.standard_error,
        }

    def recall(self) -> dict[str, Any]:
        """Exact answers and their likelihood: full model, 1% promises, and a curve of savings."""
        sources = recall_sources(
            self.model, self.tokenizer, recall_text(), self.options.recall, self.options.cases,
            self.options.seed,
        )  # fmt: skip
        profiles: dict[str, ClusterProfile | None] = {"full model": None}
        for recipe in ("default", "share"):
            path = self.out / f"profile-{recipe}.json"
            if path.exists():
                profiles[f"{recipe}, 1% promised"] = ClusterProfile.load(path)
        for save in RECALL_BUDGETS:
            for recipe in ("default", "share"):
                try:
                    profiles[f"{recipe}, {save:.0%} saved"] = self.calibrated(
                        recipe=recipe, save=save, measure=False
                    )
                except CalibrationError as error:
                    self.say(f"{recipe} at {save:.0%}: {error}")
        rows: list[dict[str, Any]] = []
        plain: dict[str, Any] = {}
        for name, profile in profiles.items():
            if time.perf_counter() - self.begin > self.options.seconds:
                self.say(f"no time for recall of {name}")
                break
            for source in sources:
                if profile is None:
                    correct, nll = recall_score(self.model, source.cases)
                    plain[source.name] = correct, nll
                else:
                    with enabled(self.model, profile):
                        correct, nll = recall_score(self.model, source.cases)
                lost = correct.float() - plain[source.name][0].float()
                more = nll - plain[source.name][1]
                error = len(correct) ** 0.5
                rows.append(
                    {
                        "profile": name,
                        "task": source.name,
                        "cases": len(correct),
                        "correct": int(correct.sum()),
                        "difference": float(lost.mean()),
                        "difference error": float(lost.std() / error),
                        "nll": float(nll.mean()),
                        "nll difference": float(more.mean()),
                        "nll difference error": float(more.std() / error),
                        "saved at 2048": profile and profile.saved(self.shape, 2048),
                    }
                )
            self.say(f"recall of {name}")
        return {"about": self.about(), "rows": rows}


def main() -> None:
    """Measure all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--other", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=LEARNT)
    parser.add_argument("--windows", type=int, default=32, help="of test text, the longest context")
    parser.add_argument("--contexts", type=_numbers, default=[1024, 2048])
    parser.add_argument("--budgets", type=_shares, default=[x / 100 for x in range(10, 90, 10)])
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--recall", type=_numbers, default=[])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    bench = Bench(parser.parse_args())
    bench.frontier(bench.options.contexts[0])
    for recipe in ("default", "share"):
        bench.part(f"promise-{recipe}", partial(bench.promise, recipe))
    for context in bench.options.contexts[1:]:
        bench.frontier(context)
    if bench.options.recall:
        bench.part("recall", bench.recall)
    bench.part("promise-stream", partial(bench.promise, "stream"))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _shares(text: str) -> list[float]:
    return [float(part) / 100 for part in text.split(",")]


if __name__ == "__main__":
    main()
