"""``chai bench model``: time to first token and per token of a whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from chai_attention.benchmarking.cases import DECODE, PREFILL, BenchmarkError, Case, name_of
from chai_attention.benchmarking.ceilings import Ceilings, drift, measure_ceilings
from chai_attention.benchmarking.memory import (
    peak_bytes,
    peaks_of_gpus,
    release,
    reset_peak,
    score_bytes,
)
from chai_attention.benchmarking.model_checks import check_model, plain_implementations
from chai_attention.benchmarking.model_work import model_work, weight_bytes
from chai_attention.benchmarking.runners import make_runner, measure_speed
from chai_attention.benchmarking.static_runner import StaticRunner
from chai_attention.benchmarking.timing import machine
from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.devices import devices_of, on_several_devices
from chai_attention.integrations.transformers.placement import Placement, random_weights
from chai_attention.integrations.transformers.room import Work, available, tensor_bytes
from chai_attention.profile import ClusterProfile
from chai_attention.progress import Progress
from chai_attention.runtime.shape import describe
from chai_attention.runtime.skeleton import empty_model

SCHEMA_VERSION = 1
UNFUSED, FUSED, WHOLE, CLUSTERED = "unfused", "fused", "k = H", "CHAI"
RUNS = (UNFUSED, FUSED, WHOLE, CLUSTERED)
_TRANSFORMERS_NAMES = {UNFUSED: "eager", FUSED: "sdpa"}


@dataclass(frozen=True)
class ModelRequest:
    """What to measure.

    Attributes:
        name: of the model, for the report.
        profile: clusters of its layers.
        profile_name: what the report calls it.
        sizes: batch and prompt tokens.
        new_tokens: tokens behind the prompt that are timed.
        seconds: how long to repeat a prompt.
        seed: of the prompts.
    """

    name: str
    profile: ClusterProfile
    profile_name: str
    sizes: Sequence[tuple[int, int]]
    new_tokens: int = 16
    seconds: float = 1.0
    seed: int = 0


def random_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: str,
    seed: int,
    placement: Placement | None = None,
    room: int = 0,
) -> PreTrainedModel:
    """Build a model with random weights where it will run.

    Args:
        config: of the model.
        dtype: of the weights.
        device: that holds them.
        seed: of the weights.
        placement: divides the model among devices, in place of ``device``.
        room: bytes to leave on each of them.

    Raises:
        BenchmarkError: it does not fit the memory.
        LoadError: nor that of several devices.
    """
    torch.manual_seed(seed)
    try:
        if placement is not None:
            empty = empty_model(config, dtype)
            return random_weights(empty, placement.divide(empty, room))
        with torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval()
    except torch.OutOfMemoryError as error:
        raise BenchmarkError(
            f"the weights do not fit the memory ({error}): use --layers for a part of the model, "
            "or --device-map auto for several GPUs"
        ) from error


def require_memory(
    config: PreTrainedConfig,
    sizes: Sequence[tuple[int, int]],
    new_tokens: int,
    dtype: torch.dtype,
    device: str,
    *,
    random: bool,
    divided: bool = False,
) -> int:
    """Refuse, before anything is built, a model and cases that do not fit the memory.

    Args:
        config: of the model.
        sizes: batch and prompt tokens of the cases.
        new_tokens: tokens behind the prompt.
        dtype: of weights, K and V.
        device: where they will be.
        random: weights are counted, as `random_model` makes them; of a checkpoint, which may be
            quantised, they are not.
        divided: a device map divides the model, and finds out itself whether it fits.

    Returns:
        Bytes that the largest case takes beside the weights, roughly: K and V, and activations.

    Raises:
        BenchmarkError: says what needs how much.
    """
    shape = describe(config)
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize
    room = max(
        batch * (tokens + new_tokens) * token + Work(batch * tokens).bytes(config, dtype)
        for batch, tokens in sizes
    )
    free = available(torch.device(device))
    if free is None or divided:
        return room
    weights = tensor_bytes(empty_model(config, dtype)) if random else 0
    if weights > free:
        raise BenchmarkError(
            f"the weights need {weights / 1e9:,.1f} GB in {name_of(dtype)}, {free / 1e9:,.1f} are "
            "free: use --layers for a part of the model, or --device-map auto for several GPUs"
        )
    for batch, tokens in sizes:
        needed = batch * (tokens + new_tokens) * token
        if weights + needed > free:
            raise BenchmarkError(
                f"K and V of {batch}x{tokens} need {needed / 1e9:,.1f} GB, "
                f"{max(0, free - weights) / 1e9:,.1f} are left for them: use a smaller case, or "
                "--device-map auto for several GPUs"
            )
    return room


def bench_model(
    model: PreTrainedModel, request: ModelRequest, progress: Progress
) -> dict[str, Any]:
    """Measure a model with several kinds of attention; nothing wrong is reported.

    The kinds are transformers' unfused and fused attention, our runtime with every head on its
    own (k = H), and clusters. Gains over "fused" are over the faster of the second and the third.
    On a GPU the fused time per token is that of the fastest of torch's backends
    ("tpot_us_by_backend"), with a mask of the cache's empty places or without.

    Args:
        model: on its device, in its dtype.
        request: what to measure.
        progress: called with (what, done, in all).

    Returns:
        What ``--out`` writes: "machine", "ceilings", "drift", "checks" and "results", a row per
        size and run with times, ideals, gains, K,V bytes and peak memory, or "missing" with the
        reason.

    Raises:
        WrongResultError: a run computes other logits than the plain model where it must not.
        ProfileError: the profile does not fit the model.
    """
    device, dtype, shape = model.device.type, model.dtype, describe(model)
    request.profile.check(shape)
    _require_positions(model, request)
    torch.manual_seed(request.seed)
    total, done = 2 + len(RUNS) * len(request.sizes), 0
    progress("checking", done, total)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": "model",
        "machine": machine(device),
        "devices": [str(device) for device in devices_of(model)],
        "model": {"name": request.name, **asdict(shape)},
        "dtype": name_of(dtype),
        "profile": request.profile_name,
        "clusters": request.profile.clusters,
        "new_tokens": request.new_tokens,
        "steps": make_runner(model, None, 1).steps,
    }
    with torch.inference_mode():
        report["checks"] = check_model(model, request.profile)
        progress("ceilings", 1, total)
        ceilings = measure_ceilings(device, dtype, min(1.0, request.seconds))
        report["ceilings"] = {name_of(dtype): asdict(ceilings)}
        report["results"] = []
        done = 2
        for batch, tokens in request.sizes:
            ids = torch.randint(model.config.vocab_size, (batch, tokens), device=device)
            rows = []
            for run in RUNS:
                progress(f"{batch} x {tokens}, {run}", done, total)
                rows.append(measure_run(model, run, request, ids, ceilings))
                release()
                done += 1
            report["results"] += gains(rows)
        after = measure_ceilings(device, dtype, min(1.0, request.seconds))
        report["drift"] = {name_of(dtype): drift(ceilings, after)}
    progress("done", total, total)
    return report


def _require_positions(model: PreTrainedModel, request: ModelRequest) -> None:
    """Refuse prompts that are longer than the model can read."""
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max(tokens for _, tokens in request.sizes) + request.new_tokens + 1
    if most is not None and longest > most:
        raise BenchmarkError(
            f"{request.name} reads at most {most} tokens; the longest case needs {longest}, "
            "new ones included: choose shorter prompts or fewer new tokens"
        )


def measure_run(
    model: PreTrainedModel, run: str, request: ModelRequest, ids: Tensor, ceilings: Ceilings
) -> dict[str, Any]:
    """One row: times, memory and ideals of one run, or why there are none."""
    batch, tokens = ids.shape
    device, shape = model.device.type, describe(model)
    several = on_several_devices(model)
    row: dict[str, Any] = {"batch": batch, "tokens": tokens, "run": run}
    free = available(model.device)
    if several:  # scores are where their layer is
        free = min(available(place) or 0 for place in devices_of(model))
    needed = score_bytes(batch, shape.heads, tokens, tokens, model.dtype)
    if run == UNFUSED and free is not None and needed > free:
        return {**row, "missing": f"its scores need {needed / 1e9:.0f} GB, {free / 1e9:.0f} free"}
    if run == FUSED and _TRANSFORMERS_NAMES[run] not in plain_implementations(model):
        return {**row, "missing": "transformers has no fused attention for this model"}
    profile = {
        WHOLE: ClusterProfile((shape.heads,) * shape.layers), CLUSTERED: request.profile,
    }.get(run)  # fmt: skip
    with _attention(model, run, profile):
        release()
        reset_peak(device)
        runner = make_runner(model, profile, tokens + request.new_tokens + 1)
        backends: dict[str, float] = {}
        try:
            speed = measure_speed(runner, ids, request.new_tokens, request.seconds)
            if run == FUSED and type(runner) is StaticRunner:
                backends = {"masked": speed.tpot_us}
                backends |= runner.backends(ids, request.new_tokens)
        except torch.OutOfMemoryError:
            return {**row, "missing": "out of memory"}
        except UnsupportedModelError as error:
            return {**row, "missing": str(error)}
        memory, peak = runner.memory(), peak_bytes(device)
        weights = weight_bytes(model)
        ideal = partial(
            model_work, shape=shape, weights=weights, element_size=model.dtype.itemsize,
            profile=profile,
        )  # fmt: skip
        middle = tokens + 1 + request.new_tokens // 2
        return {
            **row,
            "ttft_us": speed.ttft.us,
            "ttft_iqr_us": speed.ttft.iqr_us,
            "ideal_ttft_us": ideal(Case(PREFILL, batch, tokens)).ideal_us(ceilings),
            "tpot_us": min([speed.tpot_us, *backends.values()]),
            "ideal_tpot_us": ideal(Case(DECODE, batch, middle)).ideal_us(ceilings),
            "kv_bytes": memory.total_bytes,
            "full_kv_bytes": memory.full_bytes,
            "weight_bytes": weights[0],
            "peak_bytes": peak,
            **({"peak_bytes_of": peaks_of_gpus()} if several else {}),
            **({"tpot_us_by_backend": backends} if backends else {}),
        }


@contextmanager
def _attention(model: PreTrainedModel, run: str, profile: ClusterProfile | None) -> Iterator[None]:
    """Run the model with one kind of attention inside the block."""
    before = model.config._attn_implementation
    if profile is not None:
        with enabled(model, profile):
            yield
        return
    model.set_attn_implementation(_TRANSFORMERS_NAMES[run])
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add how much faster each run is than the others, and what it would be at the ideals."""
    by = {row["run"]: row for row in rows if "missing" not in row}
    whole = [by[run] for run in (FUSED, WHOLE) if run in by]
    for row in by.values():
        for name in ("ttft", "tpot"):
            unfused = by.get(UNFUSED) if row["run"] != UNFUSED else None
            fused = min(whole, key=itemgetter(f"{name}_us"), default=None)
            fused = fused if row["run"] == CLUSTERED else None
            row[f"{name}_vs_unfused"] = _ratio(unfused, row, f"{name}_us")
            row[f"{name}_vs_fused"] = _ratio(fused, row, f"{name}_us")
            row[f"{name}_fused_run"] = None if fused is None else fused["run"]
            row[f"ideal_{name}_vs_fused"] = _ratio(fused, row, f"ideal_{name}_us")
    return rows


def _ratio(other: dict[str, Any] | None, row: dict[str, Any], name: str) -> float | None:
    return None if other is None else other[name] / row[name]
