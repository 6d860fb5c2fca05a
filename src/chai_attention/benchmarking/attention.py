"""``chai bench attention``: one layer's attention, clustered and by every baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from chai_attention.benchmarking.baselines import Baseline, baselines
from chai_attention.benchmarking.cases import (
    PREFILL,
    AttentionShape,
    BenchmarkError,
    Case,
    name_of,
)
from chai_attention.benchmarking.ceilings import (
    Ceilings,
    attention_work,
    drift,
    measure_ceilings,
)
from chai_attention.benchmarking.clustered import (
    Inputs,
    Layout,
    clustered_call,
    random_inputs,
    rounded_inputs,
    with_streaming,
)
from chai_attention.benchmarking.correctness import accuracy, require_correct
from chai_attention.benchmarking.memory import release, score_bytes
from chai_attention.benchmarking.timing import Timing, machine, time_calls
from chai_attention.errors import first_line
from chai_attention.integrations.transformers.room import available
from chai_attention.membership import Membership
from chai_attention.ops.fp8 import FLOAT8
from chai_attention.progress import Progress

SCHEMA_VERSION = 1
OUT_OF_CACHE = 2  # inputs of all calls together, in sizes of the L2 cache
L2_BYTES = 50 * 2**20  # where torch does not tell


@dataclass(frozen=True)
class AttentionRequest:
    """What to measure.

    Attributes:
        shape: of the layer.
        cases: sizes.
        clusters: numbers of clusters.
        dtypes: of Q, K and V.
        device: "cpu" or "cuda".
        layout: of the clustered cache.
        seconds: time for each timing; more is less noise.
        seed: of inputs and memberships.
        representatives: ``[H]`` for some numbers of clusters; others are of equal sizes.
        streaming: heads that see local keys only, beside clusters; whole K/V heads.
    """

    shape: AttentionShape
    cases: Sequence[Case]
    clusters: Sequence[int]
    dtypes: Sequence[torch.dtype]
    device: str
    layout: Layout = field(default_factory=Layout)
    seconds: float = 1.0
    seed: int = 0
    representatives: Mapping[int, Sequence[int]] = field(default_factory=dict)
    streaming: int = 0

    def check(self) -> None:
        """Refuse what cannot be measured before anything is.

        Raises:
            BenchmarkError: says what.
        """
        page, prefill = self.layout.page, any(case.kind == PREFILL for case in self.cases)
        if self.streaming:
            self._check_streaming()
        if page is None:
            if self.layout.narrow:
                raise BenchmarkError("only pages hold 8-bit floats: --cache-dtype needs --paged")
            return
        if self.device != "cuda":
            raise BenchmarkError(
                "--paged needs CUDA: on the CPU paged attention is plain PyTorch, for tests"
            )
        if prefill and page % 16:
            raise BenchmarkError(f"prefill needs pages of a multiple of 16 tokens, not {page}")

    def _check_streaming(self) -> None:
        heads, group = self.shape.heads, self.shape.heads // self.shape.kv_heads
        if not self.layout.recent:
            raise BenchmarkError("streaming heads see an exact window: --streaming needs --recent")
        if self.streaming % group:
            raise BenchmarkError(
                f"--streaming counts heads of whole K/V heads, a multiple of {group} here, not "
                f"{self.streaming}"
            )
        most = max((k for k in self.clusters if k < heads), default=1)
        if self.streaming + most > heads:
            raise BenchmarkError(
                f"{self.streaming} streaming heads leave {heads - self.streaming} of {heads}: too "
                f"few for {most} clusters"
            )


def _require_room(request: AttentionRequest) -> None:
    """Refuse, before anything is measured, cases whose tensors alone do not fit the memory.

    Those are Q, the output, and K and V twice: as a model without clusters holds them, and as a
    clustered cache does.
    """
    free, shape = available(torch.device(request.device)), request.shape
    for case in request.cases:
        size = 4 * case.tokens * shape.kv_heads + 2 * case.queries * shape.heads
        size *= case.batch * shape.head_dim * max(dtype.itemsize for dtype in request.dtypes)
        if size > (2**63 if free is None else free):
            raise BenchmarkError(
                f"{case} needs {size / 1e9:,.1f} GB, most of it for K and V, more than there is: "
                "ask for less"
            )


def bench_attention(request: AttentionRequest, progress: Progress) -> dict[str, Any]:
    """Measure everything; a wrong result ends it without any figure.

    Args:
        request: what to measure.
        progress: called with (what, done, in all).

    Returns:
        What ``--out`` writes: "machine", "ceilings" and their "drift" by dtype, "results" (a row
        per case, dtype and number of clusters) and "baselines" (a row per case, dtype and
        baseline: "us", or "missing" with the reason).

    Raises:
        WrongResultError: a result is not the definition's.
        BenchmarkError: something cannot be measured as asked.
    """
    request.check()
    _require_room(request)
    torch.manual_seed(request.seed)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": "attention",
        "shape": asdict(request.shape),
        "layout": str(request.layout)
        + (f", {request.streaming} streaming heads" if request.streaming else ""),
        "machine": machine(request.device),
        "ceilings": {},
        "drift": {},
        "results": [],
        "baselines": [],
    }
    total, done = len(request.dtypes) * (1 + len(request.cases)), 0
    with torch.inference_mode():
        for dtype in request.dtypes:
            progress("ceilings", done, total)
            ceilings = measure_ceilings(request.device, dtype, request.seconds)
            report["ceilings"][name_of(dtype)] = asdict(ceilings)
            done += 1
            for case in request.cases:
                progress(f"{case}, {name_of(dtype)}", done, total)
                try:
                    rows, others = _measure(request, case, dtype, ceilings)
                except torch.OutOfMemoryError as error:
                    raise BenchmarkError(f"{case} does not fit the memory: {error}") from error
                report["results"] += rows
                report["baselines"] += others
                done += 1
                release()
            after = measure_ceilings(request.device, dtype, request.seconds)
            report["drift"][name_of(dtype)] = drift(ceilings, after)
    progress("done", total, total)
    return report


def _measure(
    request: AttentionRequest, case: Case, dtype: torch.dtype, ceilings: Ceilings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one size: with clusters, and of the baselines."""
    shape = request.shape
    about = {
        "kind": case.kind, "batch": case.batch, "tokens": case.tokens, "dtype": name_of(dtype),
    }  # fmt: skip
    inputs = _rotating(request, case, dtype)
    others = [
        {**about, "baseline": item.name, "fused": item.fused, **_baseline(item, inputs, request)}
        for item in baselines(request.device)
    ]
    # without a GPU's memory to fill, what holds its probabilities may be the fastest
    counted = [row for row in others if "us" in row and (row["fused"] or request.device == "cpu")]
    best = min(counted, key=lambda row: row["us"], default=None)
    local = request.layout.recent + request.layout.sinks if request.layout.recent else 0
    whole = attention_work(case, shape, shape.heads, shape.kv_heads, dtype.itemsize)
    rows = []
    for clusters in request.clusters:
        member = _membership(request, clusters, case.batch)
        calls = [clustered_call(one, member, request.layout) for one in inputs]
        layout = Layout() if member.is_identity else request.layout
        found = require_correct(
            f"attention with {clusters} clusters, {case}, {name_of(dtype)}",
            accuracy(calls[-1](), inputs[-1], member, layout),
        )
        time = time_calls(calls, request.device, request.seconds)
        stored = FLOAT8.itemsize if request.layout.narrow else None
        work = attention_work(
            case, shape, clusters, member.kept_keys, dtype.itemsize, local, stored,
            len(member.streaming), member.kept_values,
        )  # fmt: skip
        ideal = work.ideal_us(ceilings)
        rows.append(
            {
                **about,
                "clusters": clusters,
                "kept_keys": member.kept_keys,
                "kept_values": member.kept_values,
                "streaming": len(member.streaming),
                **_time(time),
                "bytes": work.bytes,
                "flops": work.flops,
                "ideal_us": ideal,
                "of_ideal": ideal / time.us,
                "baseline": None if best is None else best["baseline"],
                "baseline_us": None if best is None else best["us"],
                "speedup": None if best is None else best["us"] / time.us,
                "ideal_speedup": whole.ideal_us(ceilings) / ideal,
                "error": found.error,
                "allowed_error": found.allowed,
            }
        )
        del calls
        release()
    return rows, others


def _baseline(
    item: Baseline, inputs: Sequence[Inputs], request: AttentionRequest
) -> dict[str, Any]:
    """Time of a baseline, or why there is none."""
    if item.missing is not None:
        return {"missing": item.missing}
    heads, groups = request.shape.heads, request.shape.kv_heads
    batch = inputs[-1].query.shape[0]
    plain = Membership.identity(heads, groups, batch, inputs[-1].query.device)
    free = available(torch.device(request.device))
    query = inputs[-1].query
    size, queries = inputs[-1].key.shape[2], query.shape[2]
    needed = score_bytes(batch, heads, queries, size, query.dtype)
    if queries > 1:
        needed += queries * size * query.dtype.itemsize  # a mask
    if heads > groups:  # K and V are repeated
        needed += 2 * batch * heads * size * query.shape[3] * query.dtype.itemsize
    if not item.fused and free is not None and needed > free:
        return {"missing": f"its scores need {needed / 1e9:.0f} GB, {free / 1e9:.0f} free"}
    try:
        calls = [item.prepare(one) for one in inputs]
        found = accuracy(calls[-1](), inputs[-1], plain, Layout())
        if not found.is_correct:
            return {"missing": f"wrong result, off by {found.error:.2g}"}
        return _time(time_calls(calls, request.device, request.seconds))
    except Exception as error:  # each library has its own way to refuse a shape
        return {"missing": f"cannot run: {first_line(error)}"}
    finally:
        release()


def _rotating(request: AttentionRequest, case: Case, dtype: torch.dtype) -> list[Inputs]:
    """Inputs so many that a GPU does not find them in its L2 cache."""
    count = 1
    if request.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        cache = getattr(properties, "L2_cache_size", L2_BYTES)
        shape = request.shape
        each = 2 * dtype.itemsize * case.batch * shape.kv_heads * case.tokens * shape.head_dim
        count = -(-OUT_OF_CACHE * cache // each)
    made = [random_inputs(case, request.shape, dtype, request.device) for _ in range(count)]
    return [rounded_inputs(one) for one in made] if request.layout.narrow else made


def _membership(request: AttentionRequest, clusters: int, batch: int) -> Membership:
    shape = request.shape
    given = request.representatives.get(clusters)
    if given is None:
        streaming = request.streaming if clusters < shape.heads else 0
        member = with_streaming(shape.heads, clusters, batch, shape.kv_heads, streaming)
    else:
        rep = torch.tensor(list(given))
        member = Membership.from_representatives(rep, kv_heads=shape.kv_heads).expand(batch)
    return member.to(request.device)


def _time(time: Timing) -> dict[str, float]:
    return {"us": time.us, "iqr_us": time.iqr_us, "repeats": time.repeats}
