"""What calibrations cost one model in perplexity, and what they save: JSON and Markdown tables.

Parts: *frontier* (every recipe at the same numbers of removed heads), *promise* (does a loss
budget hold on text that calibration never saw), *domains* (calibrated on one kind of text, scored
on another) and *probe* (online memberships under a chat template). Every part scores the same
tokens for all recipes; rises are paired window by window.

    python benchmarks/quality.py MODEL --data ../shared/data --out quality/
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chai_attention.calibration import calibrate, windows_of
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.perplexity import Loss, paired_rise, token_loss
from chai_attention.calibration.template import template_tokens
from chai_attention.errors import ChaiError
from chai_attention.evaluation.frontier import RECIPES, FrontierTexts, frontier
from chai_attention.evaluation.points import PointFile, load_points
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.loading import load_model
from chai_attention.reports.frontier import frontier_plot, paper_ratio
from chai_attention.results import write_result
from chai_attention.runtime.shape import describe

REMOVED = (0.05, 0.1, 0.2, 0.3, 0.4)
PAPER_TOO = (0.025, 0.45)  # so that the paper's curve encloses the bytes of all others
LENGTH, LONG = 256, 1024
TEST = 32  # windows of LONG tokens, cut to four of LENGTH
PARTS = ("frontier", "promise", "domains", "probe", "frontier-scores")
HELD_OUT = 64
DOMAIN_REMOVED = 0.2
PROBE_REMOVED = 0.1


class Texts:
    """The text of three kinds, each with a part to calibrate on and a part to score."""

    def __init__(self, data: Path, tokenizer: Any):
        self._tokenizer = tokenizer
        passages = [
            json.loads(line)["passage"]
            for line in (data / "eval/boolq.jsonl").read_text().splitlines()
        ]
        prose = (data / "mha-lm-valid.txt").read_text()
        middle = prose.index("\n", len(prose) // 2)
        self.calibration: dict[str, Any] = {
            "wikitext": [(data / "wikitext-2/calibration.txt").read_text()],
            "boolq": passages[::2],
            "prose": [prose[:middle]],
        }
        self.test: dict[str, Any] = {
            "wikitext": [(data / "wikitext-2/test.txt").read_text()],
            "boolq": passages[1::2],
            "prose": [prose[middle:]],
        }

    def windows(self, part: dict[str, Any], name: str, count: int, length: int) -> Tensor:
        """``[count, length]`` tokens of one kind of text."""
        return windows_of(part[name], self._tokenizer, count, length, seed=0)


class Bench:
    """One model, its texts, and evidence that is collected once per calibration text."""

    def __init__(self, name: str, data: Path, out: Path, calibration: int, other: int):
        self.calibration = calibration
        self.other = other
        self.name = Path(name).name
        self.model, self.tokenizer = load_model(name, "float32")
        self.shape = describe(self.model)
        self.texts = Texts(data, self.tokenizer)
        self.out = out
        self._stores: dict[str, EvidenceStore] = {}

    @property
    def grouped(self) -> bool:
        """Whether query heads share K/V heads."""
        return self.shape.kv_heads < self.shape.heads

    def calibrated(self, text: str, **settings: Any) -> Any:
        """A profile from one kind of text, or from equal parts of all ("mixed")."""
        kinds = list(self.texts.calibration) if text == "mixed" else [text]
        each = (self.calibration + HELD_OUT) // len(kinds)
        parts = [self.texts.windows(self.texts.calibration, k, each, LENGTH) for k in kinds]
        keep = HELD_OUT // len(kinds)
        windows = torch.cat([part[: len(part) - keep] for part in parts])
        held = torch.cat([part[len(part) - keep :] for part in parts])
        if text not in self._stores:
            self._stores[text] = EvidenceStore(self.model, windows)
        return calibrate(
            self.model,
            self.tokenizer,
            windows,
            samples=len(windows),
            length=LENGTH,
            held_out=held,
            measure=False,
            source=text,
            store=self._stores[text],
            **settings,
        )

    def loss(self, windows: Tensor) -> Loss:
        """Score windows in batches of equal numbers of tokens."""
        return token_loss(self.model, windows, batch_size=max(1, 8192 // windows.shape[1]))

    def rise(self, profile: Any, windows: Tensor, baseline: Loss) -> dict[str, float]:
        """The rise of perplexity that a profile causes."""
        with enabled(self.model, profile):
            found = paired_rise(baseline, self.loss(windows))
        return {"rise": found.rise, "standard_error": found.standard_error}

    # ---- the parts

    def frontier(self, target: str | None, file: str) -> None:
        """Every recipe at the same numbers of removed heads (or K/V heads)."""
        windows = {"wikitext": self.texts.windows(self.texts.test, "wikitext", TEST, LONG)}
        about = {"model": self.name, "calibration": "wikitext", "target": target}
        for recipes, budgets in (
            ({"paper": {"recipe": "paper", "target": target}}, (*REMOVED, *PAPER_TOO)),
            ({k: {**v, "target": target} for k, v in RECIPES.items() if k != "paper"}, REMOVED),
        ):
            points = frontier(
                self.model,
                recipes,
                budgets,
                FrontierTexts(windows, (LENGTH, LONG)),
                calibrate_one=lambda **options: self.calibrated("wikitext", **options),
                asked="removed",
                kept=PointFile(self.out / f"{file}.json", about),
            )
            for point in points:
                print(f"{point.recipe} {point.budget} {point.context} {point.rise:+.4f}")

    def promise(self, refits: list[str]) -> list[dict[str, Any]]:
        """Does ``max_loss=1%`` hold on text that calibration never saw?"""
        rows = []
        for refit in refits:
            profile = self.calibrated("wikitext", max_loss=0.01, refit=refit)
            row = {"refit": refit, **dict(profile.promise)}
            for length in (LENGTH, LONG):
                windows = self.texts.windows(self.texts.test, "wikitext", TEST, LONG)
                windows = windows.unfold(1, length, length).reshape(-1, length)
                found = self.rise(profile, windows, self.loss(windows))
                row[f"test {length}"] = {**found, "saved": profile.saved(self.shape, length)}
            rows.append(row)
        return rows

    def domains(self, recipes: list[str]) -> list[dict[str, Any]]:
        """Calibrated on one kind of text, scored on all."""
        kinds = list(self.texts.test)
        tests = {k: self.texts.windows(self.texts.test, k, self.other, LENGTH) for k in kinds}
        baselines = {k: self.loss(windows) for k, windows in tests.items()}
        rows = []
        for recipe in recipes:
            for text in (*kinds, "mixed"):
                options = {k: v for k, v in RECIPES[recipe].items() if k != "target"}
                profile = self.calibrated(text, removed=DOMAIN_REMOVED, **options)
                scores = {k: self.rise(profile, tests[k], baselines[k]) for k in kinds}
                rows.append({"recipe": recipe, "calibrated on": text, **scores})
        return rows

    def probe(self) -> list[dict[str, Any]]:
        """Online memberships of chats, probed from the first token or behind the template."""
        if not self.tokenizer.chat_template:
            return []
        start = template_tokens(self.tokenizer)
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], return_dict=True
        )
        template = torch.tensor(chat["input_ids"][:start])
        content = self.texts.windows(self.texts.test, "boolq", self.other, LENGTH)
        windows = torch.cat([template.expand(len(content), -1), content], 1)
        baseline = self.loss(windows)
        rows = []
        for membership, window in (("online", 5), ("online", 32), ("blend", 32)):
            for begin in (0, start):
                profile = self.calibrated(
                    "boolq", membership=membership, window=window, probe_start=begin,
                    recent=0, removed=PROBE_REMOVED,
                )  # fmt: skip
                rows.append(
                    {
                        "membership": membership,
                        "window": window,
                        "probe_from": "content" if begin else "start",
                        "template_tokens": start,
                        **self.rise(profile, windows, baseline),
                    }
                )
        return rows


def markdown(bench: Bench, found: dict[str, Any]) -> str:
    """The tables of a model."""
    lines = [f"## {bench.name}", ""]
    for title, file in found["frontiers"].items():
        points = load_points(bench.out / f"{file}.json")
        base = {p.context: p.baseline for p in points}
        lines += [
            f"### {title}",
            "",
            "Perplexity without clusters: "
            + ", ".join(f"{v:.2f} at {k} tokens" for k, v in sorted(base.items()))
            + ".",
            "",
            "| recipe | removed | saved at 256 / 1,024 | rise, 256 tokens | / paper | "
            "rise, 1,024 tokens | / paper |",
            "|---|---|---|---|---|---|---|",
        ]
        order = {name: i for i, name in enumerate(RECIPES)}
        pairs: dict[tuple[int, float, str], dict[int, Any]] = {}
        for p in points:
            if p.budget in REMOVED:
                pairs.setdefault((order[p.recipe], p.budget, p.recipe), {})[p.context] = p
        for (_, budget, recipe), by in sorted(pairs.items()):
            short, long = by[LENGTH], by[LONG]
            lines.append(
                f"| {recipe} | {budget:.0%} | {_bytes(short)} / {_bytes(long)} | {_rise(short)} | "
                f"{_ratio(short, points)} | {_rise(long)} | {_ratio(long, points)} |"
            )
        lines.append("")
    if found.get("promise"):
        lines += _promise(found)
    if found.get("domains"):
        lines += _domains(found)
    if found.get("probe"):
        lines += [
            "",
            f"### Chat template of {found['probe'][0]['template_tokens']} tokens, "
            f"{PROBE_REMOVED:.0%} removed, no recent window",
            "",
            *_sizes(found, "probe"),
            "| membership | window | probed from start | probed from content |",
            "|---|---|---|---|",
        ]
        rows = found["probe"]
        for start, content in zip(rows[::2], rows[1::2], strict=True):
            lines.append(
                f"| {start['membership']} | {start['window']} | {_rise(start)} | {_rise(content)} |"
            )
    return "\n".join(lines) + "\n"


def _promise(found: dict[str, Any]) -> list[str]:
    """The table of what a loss budget won, and whether it holds."""
    lines = [
        "### `--max-loss 1%`",
        "",
        *_sizes(found, "promise"),
        "| refit | promised (held-out windows) | test, 256 tokens | saved | "
        "test, 1,024 tokens | saved | saved per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["promise"]:
        cells = " | ".join(
            f"{_rise(row[f'test {n}'])} | {row[f'test {n}']['saved']:.1%}" for n in (LENGTH, LONG)
        )
        lines.append(f"| {row['refit']} | {_rise(row)} | {cells} | {row['saved_per_token']:.1%} |")
    return lines


def _domains(found: dict[str, Any]) -> list[str]:
    """The table of what calibration on one kind of text costs on others."""
    kinds = [k for k in found["domains"][0] if k not in ("recipe", "calibrated on")]
    lines = [
        "",
        f"### Out of domain, {DOMAIN_REMOVED:.0%} removed, 256 tokens",
        "",
        *_sizes(found, "domains"),
        "| recipe | calibrated on | " + " | ".join(kinds) + " |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for row in found["domains"]:
        cells = " | ".join(_rise(row[k]) for k in kinds)
        lines.append(f"| {row['recipe']} | {row['calibrated on']} | {cells} |")
    return lines


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _sizes(found: dict[str, Any], part: str) -> list[str]:
    """How much text a part used, and where it ran."""
    sizes = found.get(f"{part} sizes")
    if sizes is None:
        return []
    text = f"{sizes['calibration']} calibration windows"
    text += f", {sizes['held out']} held out" if part == "promise" else ""
    text += f", {sizes['other']} test windows per text" if part != "promise" else ""
    return [f"{text}; {sizes['device']}, float32.", ""]


def _rise(row: Any) -> str:
    get: Callable[[str], float] = (
        row.__getitem__ if isinstance(row, dict) else lambda name: getattr(row, name)
    )
    digits = 2 if get("rise") < 1 else 0
    return f"{get('rise'):+.{digits}%} ±{get('standard_error'):.{digits}%}"


def _bytes(point: Any) -> str:
    return f"{'≥ ' if point.at_least else ''}{point.saved:.1%}"


def _ratio(point: Any, points: list[Any]) -> str:
    ratio = paper_ratio(point, points)
    return "-" if ratio is None else f"{ratio:.2f}"


def main() -> None:
    """Measure all parts; what is in the files already is not measured again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--other", type=int, default=96, help="test windows: domains and probe")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--refits", default="none,output", help="of the part promise")
    parser.add_argument("--recipes", default="gradient,gradient+recent", help="of the part domains")
    options = parser.parse_args()
    parts = options.parts.split(",")
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.model, options.data, options.out, options.calibration, options.other)
    file = options.out / "parts.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    frontiers = {"Heads removed, K freed" if not bench.grouped else "K/V heads removed": "frontier"}
    if bench.grouped:
        frontiers["Query heads removed (scores saved, hardly any K)"] = "frontier-scores"
    found["frontiers"] = frontiers
    targets = [(None if not bench.grouped else "k-bytes", "frontier")]
    targets += [("scores", "frontier-scores")] if bench.grouped else []

    def part(name: str, work: Callable[[], Any]) -> None:
        if name in parts and name not in found:
            start = time.perf_counter()
            found[name] = work()
            found[f"{name} sizes"] = {
                "calibration": bench.calibration,
                "held out": HELD_OUT,
                "other": bench.other,
                "device": _device(),
            }
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            write_result(file, found, ChaiError)

    if "frontier" in parts:
        bench.frontier(*targets[0])
    part("promise", lambda: bench.promise(options.refits.split(",")))
    part("domains", lambda: bench.domains(options.recipes.split(",")))
    part("probe", bench.probe)
    for target, name in targets[1:]:
        if name in parts:
            bench.frontier(target, name)
    found["frontiers"] = {
        k: v for k, v in frontiers.items() if (options.out / f"{v}.json").exists()
    }
    frontiers = found["frontiers"]
    (options.out / "tables.md").write_text(markdown(bench, found))
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return
    for name in frontiers.values():
        points = load_points(options.out / f"{name}.json")
        frontier_plot({name: points}, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
