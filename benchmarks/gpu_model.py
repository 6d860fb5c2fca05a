"""Time a whole model of LLaMA-7B's shape on a GPU: first token, and tokens in CUDA graphs.

Weights are random, the profile is the published schedule with random static clusters (a published
profile has no tables). *unfused* is transformers' eager attention, the paper's baseline; *fused* is
torch's scaled_dot_product_attention. Both sides of a decode step are replays of a CUDA graph over a
K,V cache of exactly the context's length, filled with random numbers. Results are checked first:
nothing is printed or written if a check fails.

    python benchmarks/gpu_model.py --out gpu_model.json
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache

from chai_attention.integrations.transformers import (
    DecodeGraph,
    StaticClusteredCache,
    enabled,
)
from chai_attention.profile import ClusterProfile
from plain_cache import PlainLayer, capture, whole_cache_attention

HEADS, DIM, HIDDEN, LAYERS = 32, 128, 4096, 32
DTYPE = torch.bfloat16
PROMPTS = [(1, 2048), (1, 8192)]
CONTEXTS = [(1, 8192), (16, 2048), (16, 8192)]
WINDOW = {"recent": 32, "sinks": 4}
STEPS = 24
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def make_model(layers: int, dtype: torch.dtype = DTYPE, device: str = "cuda") -> PreTrainedModel:
    """Random weights, made where they are used."""
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=HIDDEN, intermediate_size=11008, vocab_size=32000,
        num_attention_heads=HEADS, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def schedule(layers: int) -> tuple[int, ...]:
    """LLaMA-7B's published clusters, 18 x 32 then 14 x 4, in proportion for fewer layers."""
    whole = round(18 * layers / LAYERS)
    return (32,) * whole + (4,) * (layers - whole)


def random_profile(clusters: tuple[int, ...], **more: Any) -> ClusterProfile:
    """A static membership with random representatives and members."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for k in clusters:
        reps = torch.randperm(HEADS, generator=generator)[:k]
        row = reps[torch.randint(k, (HEADS,), generator=generator)]
        row[reps] = reps
        rows.append(tuple(row.tolist()))
    return ClusterProfile(clusters, "static", representatives=tuple(rows), **more)


def prompt(batch: int, tokens: int) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, 32000, (batch, tokens), generator=generator)


def release() -> None:
    """Give memory back."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def milliseconds(call: Callable[[], object], repeats: int, each: int = 1) -> float:
    """Median time of a call that does ``each`` steps, per step."""
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / each)
    return statistics.median(times)


# ---- correctness


def require(what: str, got: Tensor, want: Tensor, allowed: float) -> None:
    """Stop unless the relative error is allowed."""
    got, want = got.double().cpu(), want.double().cpu()
    error = ((got - want).norm() / want.norm()).item()
    if not error <= allowed:
        raise SystemExit(f"wrong result: {what}: relative error {error:.2e} > {allowed:.2e}")
    print(f"checked {what}: relative error {error:.1e} (allowed {allowed:.1e})", flush=True)


@torch.no_grad()
def clustered_logits(model: PreTrainedModel, profile: ClusterProfile, ids: Tensor) -> Tensor:
    """Logits of a prompt and of the last 8 tokens taken one at a time, by a graph on CUDA."""
    ids = ids.to(model.device)
    with enabled(model, profile):
        cache = StaticClusteredCache(model, profile, batch_size=len(ids), max_tokens=ids.shape[1])
        parts = [model(ids[:, :-8], past_key_values=cache).logits]
        if model.device.type == "cuda":
            graph = DecodeGraph(model, cache)
            parts += [graph.step(token).clone() for token in ids[:, -8:].split(1, 1)]
            del graph
        else:
            for token in ids[:, -8:].split(1, 1):
                parts.append(model(token, past_key_values=cache).logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def check() -> None:
    """Two layers in bfloat16 on the GPU against the same in float32 on the CPU."""
    model = make_model(2)
    exact = make_model(2, torch.float32, "cpu")
    exact.load_state_dict(model.state_dict())
    ids = prompt(2, 192)
    exact.set_attn_implementation("sdpa")
    model.set_attn_implementation("sdpa")
    whole = exact(ids).logits
    plain = model(ids.cuda()).logits
    loss = ((plain.double().cpu() - whole.double()).norm() / whole.double().norm()).item()
    identity = ClusterProfile((HEADS,) * 2, window=8)
    require("no clusters, against sdpa's float32", clustered_logits(model, identity, ids), whole,
            2 * loss + 1e-3)  # fmt: skip
    for name, profile in {
        "static clusters": random_profile((32, 4)),
        "static clusters, recent window": random_profile((4, 4), **WINDOW),
    }.items():
        want = clustered_logits(exact, profile, ids)
        require(name, clustered_logits(model, profile, ids), want, 2 * loss + 1e-3)
    del model, exact
    release()


# ---- first token


def plain_prompt(model: PreTrainedModel, ids: Tensor) -> object:
    """A prompt and its growing K,V cache."""
    return model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)


def clustered_prompt(model: PreTrainedModel, ids: Tensor, cache: StaticClusteredCache) -> object:
    """A prompt in a static cache."""
    cache.reset()
    return model(ids, past_key_values=cache, logits_to_keep=1)


@torch.no_grad()
def first_token(layers: int) -> list[dict[str, Any]]:
    """Time of a whole prompt, its K,V cache included."""
    model, clusters = make_model(layers), schedule(layers)
    static = random_profile(clusters)
    online = ClusterProfile(clusters, window=5)
    ids, logits = prompt(1, 256).cuda(), {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        logits[name] = model(ids, logits_to_keep=1).logits.double()
    noise = ((logits["eager"] - logits["sdpa"]).norm() / logits["sdpa"].norm()).item()
    with enabled(model, ClusterProfile((HEADS,) * layers, window=5)):
        got = model(ids, logits_to_keep=1).logits
    require(f"no clusters, {layers} layers", got, logits["sdpa"], 2 * noise + 1e-3)
    rows = []
    for batch, tokens in PROMPTS:
        ids = prompt(batch, tokens).cuda()
        times, peaks = {}, {}
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            release()

            call = partial(plain_prompt, model, ids)
            call()
            times[name] = milliseconds(call, 5 if name == "eager" else 10)
            peaks[name] = torch.cuda.max_memory_allocated()
        for name, profile in {"static": static, "online": online}.items():
            release()
            with enabled(model, profile):
                cache = StaticClusteredCache(model, profile, batch_size=batch, max_tokens=tokens)

                call = partial(clustered_prompt, model, ids, cache)
                for _ in range(2):
                    call()
                times[name] = milliseconds(call, 10)
                peaks[name] = torch.cuda.max_memory_allocated()
                del cache, call
        ideal = {name: prompt_work(model, batch, tokens, None)
                 / prompt_work(model, batch, tokens, clusters)
                 for name in ("static", "online")}  # fmt: skip
        for name in ("static", "online"):
            row = {
                "kind": "ttft", "batch": batch, "tokens": tokens, "layers": layers, "chai": name,
                "ms": times[name], "unfused_ms": times["eager"], "fused_ms": times["sdpa"],
                "against_unfused": times["eager"] / times[name],
                "against_fused": times["sdpa"] / times[name],
                "ideal_against_fused": ideal[name],
                "peak_bytes": peaks[name], "unfused_peak_bytes": peaks["eager"],
                "fused_peak_bytes": peaks["sdpa"],
            }  # fmt: skip
            rows.append(row)
            print(
                f"TTFT {batch} x {tokens}, CHAI {name:>6}: {row['ms']:8.2f} ms, unfused "
                f"{row['unfused_ms']:8.2f} ms = {row['against_unfused']:.2f}x, fused "
                f"{row['fused_ms']:8.2f} ms = {row['against_fused']:.3f}x (ideal "
                f"{ideal[name]:.3f}x)",
                flush=True,
            )
    return rows


def prompt_work(
    model: PreTrainedModel, batch: int, tokens: int, clusters: tuple[int, ...] | None
) -> float:
    """Multiplications and additions of a prompt's matrix products."""
    numbers = sum(p.numel() for p in model.model.layers.parameters())
    heads = sum((k + HEADS) / 2 for k in clusters or (HEADS,) * len(model.model.layers))
    return 2 * batch * tokens * numbers + 2 * batch * tokens**2 * DIM * heads


# ---- further tokens


@torch.no_grad()
def plain_steps(model: PreTrainedModel, batch: int, size: int) -> dict[str, Any]:
    """Time per token of the plain model, by its fastest backend."""
    release()
    position = torch.full((1,), size - 1, device="cuda")
    shape = (batch, HEADS, size, DIM)
    cache = Cache(layers=[PlainLayer(shape, DTYPE, position) for _ in model.model.layers])
    held = 0
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor.normal_()
            held += tensor.untyped_storage().nbytes()
    ids = prompt(batch, 1).cuda()
    positions = position.expand(batch, 1)
    best: dict[str, Any] = {"ms": float("inf")}
    with whole_cache_attention(model):
        for name, backend in BACKENDS.items():
            with sdpa_kernel(backend):
                try:
                    graph = capture(
                        lambda: model(ids, position_ids=positions, past_key_values=cache)
                    )
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    print(f"no {name}: {str(error).splitlines()[0]}")
                    continue
            time = milliseconds(graph.replay, STEPS // 2)
            del graph
            if time < best["ms"]:
                best = {"ms": time, "backend": name}
    if "backend" not in best:
        raise torch.OutOfMemoryError("no backend could run a step")
    return {**best, "cache_bytes": held, "peak_bytes": torch.cuda.max_memory_allocated()}


@torch.no_grad()
def clustered_steps(
    model: PreTrainedModel, profile: ClusterProfile, batch: int, size: int
) -> dict[str, Any]:
    """Time per token with clusters; the last step sees ``size`` keys."""
    release()
    with enabled(model, profile):
        cache = StaticClusteredCache(model, profile, batch_size=batch, max_tokens=size)
        for layer in cache.layers:
            for tensor in layer.tensors().values():
                tensor.normal_()
        ids = prompt(batch, 1).cuda()
        graph = DecodeGraph(model, cache)
        cache.rewind(size - 1)
        graph.step(ids)
        each = 4

        def steps() -> None:
            for _ in range(each):
                graph.step(ids)

        times = []
        for _ in range(STEPS // each):
            cache.rewind(size - each)
            times.append(milliseconds(steps, 1, each))
        memory = cache.memory()
        held = memory.key_bytes + memory.value_bytes + memory.recent_bytes
        removed = [HEADS - k for k in profile.clusters]
        formula = sum(batch * size * DIM * DTYPE.itemsize * (k + HEADS) for k in profile.clusters)
        if profile.recent:
            formula += sum(
                batch * r * (profile.recent + profile.sinks) * DIM * DTYPE.itemsize for r in removed
            )
        storages = [t.untyped_storage().nbytes() for lay in cache.layers
                    for t in lay.tensors().values()]  # fmt: skip
        if not held == formula == sum(storages):
            raise SystemExit(f"{held} bytes held, {sum(storages)} allocated, {formula} expected")
        return {
            "ms": statistics.median(times), "cache_bytes": held,
            "weight_bytes": weight_bytes(model),
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }  # fmt: skip


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes a step reads: all weights but the table of embeddings."""
    table = model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - table


def next_tokens(layers: int) -> list[dict[str, Any]]:
    """Time per token at every context, both sides with the same layers."""
    rows, model = [], make_model(layers)
    for batch, size in CONTEXTS:
        while True:
            plain = None
            with suppress(torch.OutOfMemoryError):
                plain = plain_steps(model, batch, size)
            if plain is not None:
                break
            fewer = len(model.model.layers) - 4
            print(f"{batch} x {size} does not fit plainly with {fewer + 4} layers: {fewer}")
            del model
            release()
            model = make_model(fewer)
        weights, count = weight_bytes(model), len(model.model.layers)
        for name, more in (("recent=0", {}), ("recent=32+4", WINDOW)):
            got = clustered_steps(model, random_profile(schedule(count), **more), batch, size)
            ideal = (weights + plain["cache_bytes"]) / (got["weight_bytes"] + got["cache_bytes"])
            rows.append({
                "kind": "tpot", "batch": batch, "tokens": size, "layers": count, "chai": name,
                **got, "fused_ms": plain["ms"], "backend": plain["backend"],
                "fused_cache_bytes": plain["cache_bytes"], "fused_weight_bytes": weights,
                "fused_peak_bytes": plain["peak_bytes"],
                "against_fused": plain["ms"] / got["ms"], "ideal_against_fused": ideal,
            })  # fmt: skip
            print(
                f"TPOT {batch} x {size}, {count} layers, CHAI {name}: {got['ms']:7.3f} ms, fused "
                f"({plain['backend']}) {plain['ms']:7.3f} ms = {rows[-1]['against_fused']:.3f}x "
                f"(ideal {ideal:.3f}x); cache {got['cache_bytes'] / 1e9:.2f} of "
                f"{plain['cache_bytes'] / 1e9:.2f} GB, peak {got['peak_bytes'] / 1e9:.2f} of "
                f"{plain['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
        if count < layers:  # the next context may fit
            del model
            release()
            model = make_model(layers)
    return rows


def main() -> None:
    """Check, measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("ttft", "tpot"), help="measure a part")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer than 32 for less memory")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(machine)
    check()
    rows = []
    if options.only != "tpot":
        rows += first_token(options.layers)
        release()
    if options.only != "ttft":
        rows += next_tokens(options.layers)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
