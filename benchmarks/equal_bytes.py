"""What other methods lose at the K,V bytes of a profile, by the likelihood of a text.

usage: python benchmarks/equal_bytes.py MODEL --profile default.json --profile share.json
       --text test.txt --calibration-text calibration.txt --lengths 1024,2048 --out folder/

Windows of a text are scored in their second half, given the first (as `chai eval`'s perplexity,
without its harness). Methods that act on the K,V cache are scored in two calls, so that all that
is scored reads the finished cache. For every profile, those with a budget get the share that the
profile saves at that length, exact windows included. Every row is written as it comes, and is
not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chai_attention.calibration import load_texts, windows_of
from chai_attention.errors import ChaiError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.evaluation.comparators.registry import comparators
from chai_attention.evaluation.profiled import PROFILE
from chai_attention.integrations.transformers.loading import load_model
from chai_attention.integrations.transformers.methods import cached_logits
from chai_attention.profile import ClusterProfile
from chai_attention.results import RowFile
from chai_attention.runtime.shape import describe

BUDGETED = ("snapkv", "think", "spatten", "spatten-mean")
OTHERS = ("quant8", "quant4", "chai+quant8", "chai+quant4", "float8", "chai+float8")
TOKENS = 1 << 16  # of text for every length
TOKENS_OF_A_FORWARD = 1 << 14


class Rows(RowFile[dict[str, Any]]):
    """What was measured so far; a method is asked once for each length and profile."""

    @classmethod
    def key_of(cls, row: dict[str, Any]) -> str:
        """What was asked."""
        return json.dumps([row[name] for name in ("length", "profile", "method")])


class Bench:
    """One model and the rows of its table."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.begin = options, time.perf_counter()
        self.model, self.tokenizer = load_model(options.model, options.dtype, options.device)
        self.shape = describe(self.model)
        self.documents = load_texts(options.text, tokens=400_000)
        learn = load_texts(options.calibration_text, tokens=400_000)
        self.learn = windows_of(learn, self.tokenizer, 128, 256, 0)
        self.rows = Rows(options.out / "equal_bytes.json", self.about())
        self.plain: dict[int, Tensor] = {}

    def windows(self, length: int) -> Tensor:
        """``[N, S]`` windows of the text."""
        return windows_of(self.documents, self.tokenizer, TOKENS // length, length, 0)

    def run(self, length: int) -> None:
        """Every profile, and every method at its bytes."""
        windows = self.windows(length)
        self.plain[length] = second_halves(self.model, windows, None)
        for path in self.options.profile:
            profile = ClusterProfile.load(path)
            saved = profile.saved(self.shape, length)
            self.row(length, path, PROFILE, profile, saved, windows)
            for name in self.options.compare:
                self.row(length, path, name, profile, saved, windows)

    def row(
        self,
        length: int,
        path: str,
        name: str,
        profile: ClusterProfile,
        saved: float,
        windows: Tensor,
    ) -> None:
        """Measure one method, unless it is there or the time is up."""
        about = {"length": length, "profile": Path(path).stem, "method": name}
        done = self.rows.get(Rows.key_of(about)) is not None
        if done or time.perf_counter() - self.begin > self.options.seconds:
            return
        try:
            made = comparators(
                [name], model=self.model, tokens=list(self.learn), profile=profile,
                save=saved if name in BUDGETED else None,
            )[name]  # fmt: skip
            with made.attached(self.model):
                nll = second_halves(self.model, windows, made)
        except ChaiError as error:
            print(f"{about}: {error}", flush=True)
            return
        more = nll - self.plain[length]
        row = {
            **about,
            "windows": len(windows),
            "kept": made.kv_share(self.model, length),
            "nll": float(nll.mean()),
            "nll difference": float(more.mean()),
            "standard error": float(more.std() / len(more) ** 0.5),
        }
        print(f"[{time.perf_counter() - self.begin:.0f} s] {json.dumps(row)}", flush=True)
        self.rows.add(row)

    def about(self) -> dict[str, Any]:
        """What all rows have in common."""
        device = self.model.device
        return {
            "model": Path(self.options.model).name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "text": Path(self.options.text).name,
        }


@torch.no_grad()
def second_halves(model: Any, windows: Tensor, method: Comparator | None) -> Tensor:
    """``[N]`` float64: mean negative log-likelihood of the second half of every window, nats."""
    length = windows.shape[1]
    half = length - length // 2
    cached = method is not None and method.needs_cache
    found = []
    for rows in windows.split(1 if cached else max(1, TOKENS_OF_A_FORWARD // length)):
        if cached:
            assert method is not None
            logits = cached_logits(model, method, rows[:, :-1], half)
        else:
            batch = rows[:, :-1].to(model.device)
            logits = model(batch, use_cache=False).logits[:, -half:]
        for scores, row in zip(logits, rows, strict=True):
            wanted = row[-half:].to(scores.device)
            each = torch.nn.functional.cross_entropy(scores.float(), wanted, reduction="none")
            found.append(each.double().mean().cpu())
    return torch.stack(found)


def main() -> None:
    """Measure all lengths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--profile", action="append", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration-text", required=True)
    parser.add_argument("--lengths", type=_numbers, default=[1024, 2048])
    parser.add_argument("--compare", type=_names, default=[*BUDGETED, *OTHERS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    bench = Bench(parser.parse_args())
    bench.options.out.mkdir(parents=True, exist_ok=True)
    for length in bench.options.lengths:
        bench.run(length)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
