"""Long contexts on one card: calibration, evaluation and kernels at 8k to 128k tokens, as JSON.

A model of LLaMA-7B's shape with random weights, bfloat16, reads windows of random tokens: time and
memory do not depend on the text. Of calibration the two passes for evidence are measured, on one
window of each length: the one for attention maps and offsets, and the one for gradient costs of all
exact windows from 32 to 512 keys. Results are written as they come, and a stopped run continues.
What would begin after ``--limit`` seconds is left out, and named.

    python benchmarks/long_context.py --out long.json
    python benchmarks/long_context.py --tiny --out tiny.json      # on a CPU, to see that it runs
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from chai_attention import ClusterProfile
from chai_attention.benchmarking.attention import AttentionRequest, bench_attention
from chai_attention.benchmarking.cases import AttentionShape, parse_case
from chai_attention.benchmarking.clustered import Layout
from chai_attention.benchmarking.memory import peak_bytes, release, reset_peak
from chai_attention.benchmarking.model import random_model
from chai_attention.benchmarking.timing import machine
from chai_attention.calibration.costs import ExactWindow, OffsetStatistics, collect_costs
from chai_attention.calibration.perplexity import token_loss
from chai_attention.calibration.recall import RecallCase
from chai_attention.calibration.recall_score import recall_score
from chai_attention.calibration.statistics import GramStatistics, observe
from chai_attention.evaluation.head_sums import HeadSums
from chai_attention.evaluation.redundancy import default_lengths
from chai_attention.integrations.transformers import enabled
from chai_attention.progress import quiet
from parts import Parts

RECENTS, SINKS = (32, 64, 128, 256, 512), 4
LOCAL = (256, 4)  # the exact window of evaluations and kernels
Step = Callable[[], Any]


class Sizes:
    """What is measured: lengths of windows and of kernels, and the model's shape."""

    def __init__(self, tiny: bool, layers: int | None):
        self.lengths: tuple[int, ...] = (96, 130, 200) if tiny else (8192, 16_384, 32_768)
        self.kernels: tuple[int, ...] = (128, 300) if tiny else (32_768, 131_072)
        self.recents = (4, 16) if tiny else RECENTS
        self.window = (16, 2) if tiny else LOCAL
        heads = 8 if tiny else 32
        self.shape = AttentionShape(
            "tiny" if tiny else "llama-7b", heads, heads, 32 if tiny else 128
        )
        self.config = LlamaConfig(
            hidden_size=heads * self.shape.head_dim,
            intermediate_size=512 if tiny else 11_008,
            num_hidden_layers=layers or (2 if tiny else 32),
            num_attention_heads=heads,
            vocab_size=1000 if tiny else 32_000,
            max_position_embeddings=max(self.lengths),
        )

    @property
    def profile(self) -> ClusterProfile:
        """A quarter of the heads stream, a quarter are representatives of three heads each."""
        heads, layers = self.shape.heads, self.config.num_hidden_layers
        far = heads * 3 // 4
        rep = tuple(head // 3 * 3 if head < far else head for head in range(heads))
        return ClusterProfile(
            (far // 3,) * layers,
            membership="static",
            representatives=(rep,) * layers,
            streaming=(tuple(range(far, heads)),) * layers,
            recent=self.window[0],
            sinks=self.window[1],
        )


class Report(Parts):
    """Results; steps of an earlier run are not done again."""

    def __init__(self, out: Path, about: dict[str, Any], limit: float, device: str):
        super().__init__(out, about)
        self._limit, self._device = limit, device
        self._start = time.perf_counter()
        self.found |= {"machine": machine(device), "left_out": []}
        self.add("rows", self.found.get("rows", []))

    def has(self, about: dict[str, Any]) -> bool:
        """Whether a step was measured."""
        rows = self.found["rows"]
        return any(about.items() <= row.items() and "missing" not in row for row in rows)

    def measure(self, about: dict[str, Any], step: Step, again: bool = False) -> Any:
        """Run a step, and write down its seconds and the most memory that was held.

        Returns:
            What the step returns; None if it was measured before (unless ``again``) or time is up.
        """
        if self.has(about) and not again:
            return None
        spent = time.perf_counter() - self._start
        if spent > self._limit:
            self.add("left_out", [*self.found["left_out"], about])
            return None
        release()
        reset_peak(self._device)
        wait(self._device)
        start = time.perf_counter()
        row, value = dict(about), None
        try:
            value = step()
            wait(self._device)
            row["seconds"] = round(time.perf_counter() - start, 3)
            row["peak_bytes"] = peak_bytes(self._device)
        except torch.OutOfMemoryError as error:
            row["missing"] = str(error).splitlines()[0]
        others = [other for other in self.found["rows"] if not about.items() <= other.items()]
        print(f"{time.perf_counter() - self._start:6.1f} s  {json.dumps(row)}", flush=True)
        self.add("rows", [*others, row])
        return value


def wait(device: str) -> None:
    """Let the device finish."""
    if device == "cuda":
        torch.cuda.synchronize()


def calibration(model: PreTrainedModel, sizes: Sizes, report: Report) -> None:
    """Both passes over one window of each length."""
    config = model.config
    shape = config.num_hidden_layers, config.num_attention_heads
    exact = [ExactWindow(recent, SINKS) for recent in sizes.recents]
    warm = windows(model, 64)
    for length in (None, *sizes.lengths):
        ids = warm if length is None else windows(model, length)

        def maps(ids: Tensor = ids) -> list[Tensor]:
            grams, offsets = GramStatistics(*shape), OffsetStatistics(*shape, exact)
            observe(model, ids, [grams.add, offsets.add], batch_size=1)
            return offsets.offsets

        def costs(ids: Tensor, offsets: list[Tensor]) -> None:
            given = [ExactWindow(n.recent, n.sinks, o) for n, o in zip(exact, offsets, strict=True)]
            found = collect_costs(model, ids, "gradient", exact=given, batch_size=1)
            assert all(one.sharing.isfinite().all() for one in found)

        if length is None:  # compiles, and fills caches of the libraries
            costs(ids, maps())
            continue
        about = {"part": "calibration", "length": length, "windows": len(ids)}
        second = {**about, "pass": f"gradient costs, {len(exact)} exact windows"}
        if report.has(second):
            continue
        offsets = report.measure({**about, "pass": "maps and offsets"}, maps, again=True)
        if offsets is not None:
            report.measure(second, partial(costs, ids, offsets))


def evaluation(model: PreTrainedModel, sizes: Sizes, report: Report) -> None:
    """Perplexity and recall in one window of the longest length, then the study of redundancy."""
    length = max(sizes.lengths)
    ids = windows(model, length)
    case = RecallCase(ids[0, :-8].cpu(), ids[0, -8:].cpu())

    def score() -> None:
        assert token_loss(model, ids, batch_size=1).finite

    def recall() -> None:
        recall_score(model, [case])

    def redundancy() -> None:
        shape = model.config
        lengths = default_lengths(length)
        sums = HeadSums(range(shape.num_hidden_layers), shape.num_attention_heads, lengths)
        observe(model, ids, [sums], batch_size=1)

    about = {"part": "evaluation", "length": length}
    for heads in ("full", "clustered"):
        with enabled(model, sizes.profile) if heads == "clustered" else nullcontext():
            token_loss(model, ids[:, :600], batch_size=1)  # compiles
            report.measure({**about, "heads": heads, "task": "perplexity"}, score)
            report.measure({**about, "heads": heads, "task": "recall"}, recall)
    report.measure({**about, "heads": "full", "task": "redundancy"}, redundancy)


def kernels(sizes: Sizes, report: Report, device: str, seconds: float) -> None:
    """One layer's attention beside all baselines: dense, and decode over pages."""
    heads = sizes.shape.heads
    for kind, page in (("decode", None), ("decode", 64), ("prefill", None)):
        if page is not None and device != "cuda":
            continue
        for tokens in sizes.kernels:
            case = f"{kind}:1x{tokens}"
            request = AttentionRequest(
                shape=sizes.shape,
                cases=[parse_case(case)],
                clusters=(heads // 4,),
                dtypes=[torch.bfloat16 if device == "cuda" else torch.float32],
                device=device,
                layout=Layout(page, *sizes.window),
                seconds=seconds,
                streaming=heads // 4,
            )
            found = report.measure(
                {"part": "kernels", "case": case, "layout": str(request.layout)},
                partial(bench_attention, request, quiet),
            )
            if found is not None:
                report.add(f"{case}, {request.layout}", found)
                for row in (*found["baselines"], *found["results"]):
                    about = ("baseline", "clusters", "us", "speedup", "missing")
                    print("   ", {key: row[key] for key in about if row.get(key) is not None})


def windows(model: PreTrainedModel, length: int) -> Tensor:
    """One window of tokens at random, on the model's device."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=draw)
    return ids.to(model.device)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small model, on the CPU")
    parser.add_argument("--layers", type=int, help="so many layers only")
    parser.add_argument("--lengths", help="tokens of calibration windows: 8192,32768")
    parser.add_argument("--kernels", help="tokens of kernels' cases: 32768,131072")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds; what is left is named")
    parser.add_argument("--seconds", type=float, default=0.02, help="of each timing of a kernel")
    parser.add_argument("--only", default="calibration,evaluation,kernels")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    sizes = Sizes(options.tiny, options.layers)
    if options.lengths:
        sizes.lengths = tuple(int(n) for n in options.lengths.split(","))
        sizes.config.max_position_embeddings = max(sizes.lengths)
    if options.kernels:
        sizes.kernels = tuple(int(n) for n in options.kernels.split(","))
    about = {
        "benchmark": "long contexts", "lengths": sizes.lengths, "kernels": sizes.kernels,
        "model": {**sizes.config.to_diff_dict(), "dtype": "bfloat16"},
    }  # fmt: skip
    report = Report(options.out, about, options.limit, device)
    parts = options.only.split(",")
    if {"calibration", "evaluation"} & set(parts):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = report.measure(
            {"part": "model"}, lambda: random_model(sizes.config, dtype, device, seed=0), again=True
        )
        report.add("weight_bytes", sum(p.nbytes for p in model.parameters()))
        if "calibration" in parts:
            calibration(model, sizes, report)
        if "evaluation" in parts:
            evaluation(model, sizes, report)
        del model
        release()
    if "kernels" in parts:
        kernels(sizes, report, device, options.seconds)


if __name__ == "__main__":
    main()
