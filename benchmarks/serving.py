"""Serving of LLaMA-7B's shape on one GPU: vLLM with FlashAttention against clustered heads.

Random weights, bfloat16, torch.compile and CUDA graphs as vLLM has them, prefix caching off. Every
engine runs in a process of its own and measures, in this order: K,V capacity; time to first token
(of all rows of a batch) and time per output token (of steps in which all rows decode); throughput
with more requests waiting than run, of long prompts and of lengths like those of chats. Results are
written after each part. ``warm`` starts all engines at once with small caches, which fills the
compile caches and shows early what does not run.

    python benchmarks/serving.py warm --work /tmp/serving --out results
    python benchmarks/serving.py time --work /tmp/serving --out results --only stock
    python benchmarks/serving.py time --work /tmp/serving --out results --only published --only k=8
    python benchmarks/serving.py table --out results
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serving_jobs import (
    STOCK,
    Kinds,
    capacity,
    engine,
    in_process,
    jobs,
    label,
    params,
    progress,
    write_config,
)

STEPS = 40  # new tokens of each row
CASES = {  # batch x tokens with the new ones: runs, of which the first of several does not count
    (16, 8192): 3,
    (1, 2048): 21,
    (16, 2048): 3,
    (1, 8192): 4,
    (14, 8192): 3,  # what the cache of the stock engine holds
}
# requests that come at once, more than run at a time: "chats" have log-normal lengths, of
# ShareGPT's order
LOADS = {"chats": 800, "long prompts": 36}
LENGTH = 8192
HEADS = 32  # and layers
# name: clusters per layer, membership, exact recent window
TIMED: Kinds = {
    "published": ([32] * 18 + [4] * 14, "static", 0),
    "k=8": ([8] * HEADS, "static", 0),
    "published online": ([32] * 18 + [4] * 14, "online", 0),
    "k=8 window": ([8] * HEADS, "static", 32),
}
OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "max_model_len": LENGTH,
    "max_num_seqs": 640,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
    # an engine starts sooner with few graphs; batches between them run in the next larger one
    "compilation_config": {
        "cudagraph_capture_sizes": [
            1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640
        ]
    },
}  # fmt: skip
TIMES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "mean_tpot_ms": "mean TPOT", "total_ms": "all"}
SPARE = 400 * 2**20  # bytes of the GPU left to other things


class Results:
    """One engine's results, in a file that is up to date after each part."""

    def __init__(self, file: Path, about: dict[str, Any]):
        self.file = file
        self.found: dict[str, Any] = {"about": about, "cases": {}, "throughput": {}}

    def add(self, part: str, name: str | None, value: Any) -> None:
        """Add a part and save."""
        if name is None:
            self.found[part] = value
        else:
            self.found[part][name] = value
        self.file.write_text(json.dumps(self.found, indent=1) + "\n")
        progress(f"{name or part}: {json.dumps(value)}")


def groups_of(clusters: list[int], ranks: int) -> list[int]:
    """Each head's cluster in the layers with the fewest, no cluster on two of the ranks."""
    here, heads = min(clusters) // ranks, HEADS // ranks
    return [head // heads * here + head % here for head in range(HEADS)]


def prompts_of(sizes: list[int], seed: int) -> list[dict[str, list[int]]]:
    """Random prompts."""
    chosen = random.Random(seed)
    return [{"prompt_token_ids": chosen.choices(range(3, 32000), k=size)} for size in sizes]


def run_job(job: dict[str, Any]) -> None:
    """Measure everything with one engine."""
    import torch
    import vllm

    free, total = torch.cuda.mem_get_info()
    options = job["options"]
    if "gpu_memory_utilization" not in options:
        # ranks are processes of their own, and this one's CUDA context stays beside theirs
        spare = SPARE * (4 if options["tensor_parallel_size"] > 1 else 1)
        options["gpu_memory_utilization"] = int((free - spare) / total * 1000) / 1000
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "model": "LLaMA-7B shape, random weights, bfloat16",
        "options": options,
    }
    results = Results(Path(job["result"]), about)
    start = time.perf_counter()
    llm = engine(job)
    results.add("start_s", None, round(time.perf_counter() - start, 1))
    results.add("capacity", None, capacity(llm))
    generate_batch(llm, [2048] * 2, 8, 0)  # what is compiled at the first call
    if job["warm"]:
        results.add("cases", "warm", generate_batch(llm, [300] * 3, 8, 1))
        return
    for (batch, length), repeats in CASES.items():
        name = f"{batch} x {length}"
        if may_run(name, job):
            found = run_case(llm, batch, length, repeats)
            found["fits"] = batch * length < capacity(llm)["tokens"]  # one page is nobody's
            results.add("cases", name, found)
        if (batch, length) == (16, 8192):
            for load in LOADS:
                if may_run(load, job):
                    results.add("throughput", load, throughput(llm, load))


def may_run(part: str, job: dict[str, Any]) -> bool:
    """Whether a part is asked for and there is time for it."""
    if job["parts"] and part not in job["parts"]:
        return False
    if time.time() > job["until"]:
        progress(f"no time left for {part}")
        return False
    return True


def run_case(llm: Any, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """Median times of a batch."""
    prompts = [length - STEPS] * batch
    runs = [generate_batch(llm, prompts, STEPS, seed) for seed in range(repeats)]
    runs = runs[1:] or runs
    median = {key: round(statistics.median(run[key] for run in runs), 3) for key in TIMES}
    return {**median, "runs": runs}


def generate_batch(llm: Any, sizes: list[int], count: int, seed: int) -> dict[str, float]:
    """Generate with prompts that come at once.

    Returns:
        ``ttft_ms`` until all rows have a token, ``tpot_ms`` of the steps between that and the first
        row's end, and the number of these ``steps``; ``mean_tpot_ms`` of requests from their first
        token to their last, with whatever else the engine did meanwhile; ``total_ms``.
    """
    import torch

    engine = llm.llm_engine
    for row, prompt in enumerate(prompts_of(sizes, seed)):
        engine.add_request(f"{seed}-{row}", prompt, params(count))
    torch.accelerator.synchronize()
    start = time.perf_counter()
    seen: dict[str, int] = {}
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    first = last = 0.0
    steps = 0
    while engine.has_unfinished_requests():
        done = engine.step()
        now = time.perf_counter()
        if not done:
            continue
        for request in done:
            seen[request.request_id] = len(request.outputs[0].token_ids)
            began.setdefault(request.request_id, now)
            ended[request.request_id] = now
        if len(seen) == len(sizes):
            if not first:
                first = last = now
            elif not any(request.finished for request in done) and max(seen.values()) < count:
                steps, last = steps + 1, now
    spans = [(ended[name] - began[name]) / (count - 1) for name in ended]
    return {
        "ttft_ms": round((first - start) * 1e3, 2),
        "tpot_ms": round((last - first) / max(1, steps) * 1e3, 3),
        "steps": steps,
        "mean_tpot_ms": round(statistics.mean(spans) * 1e3, 3),
        "total_ms": round((max(ended.values()) - start) * 1e3, 1),
    }


def loads(name: str) -> list[tuple[int, int]]:
    """Tokens of each request's prompt and output, the same in every run."""
    chosen = random.Random(7)
    count = LOADS[name]
    if name == "chats":
        drawn = [
            (chosen.lognormvariate(4.9, 1.0), chosen.lognormvariate(5.1, 0.6)) for _ in range(count)
        ]
        return [(max(4, min(2048, int(a))), max(4, min(768, int(b)))) for a, b in drawn]
    return [(chosen.randint(4096, 7600), chosen.randint(128, 320)) for _ in range(count)]


def throughput(llm: Any, name: str) -> dict[str, float]:
    """Tokens per second, altogether and for as long as requests wait."""
    engine = llm.llm_engine
    sizes = loads(name)
    read, written = (sum(each) for each in zip(*sizes, strict=True))
    prompts = prompts_of([length for length, _ in sizes], 3)
    start = time.perf_counter()
    for row, (prompt, (_, count)) in enumerate(zip(prompts, sizes, strict=True)):
        engine.add_request(f"load-{name}-{row}", prompt, params(count))
    seen: dict[str, int] = {}
    saturated = (0.0, 0)  # time and tokens when the last request began
    while engine.has_unfinished_requests():
        for request in engine.step():
            seen[request.request_id] = len(request.outputs[0].token_ids)
        if len(seen) == len(sizes) and not saturated[1]:
            saturated = (time.perf_counter() - start, sum(seen.values()))
    spent = time.perf_counter() - start
    return {
        "seconds": round(spent, 2),
        "output_tokens_s": round(written / spent, 1),
        "all_tokens_s": round((read + written) / spent, 1),
        "saturated_seconds": round(saturated[0], 2),
        "saturated_output_tokens_s": round(saturated[1] / saturated[0], 1),
    }


def chosen_jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The jobs that the command line asks for."""
    model = options.work / "seven"
    write_config(model)
    until = time.time() + 10**9
    names = options.only or [STOCK, "published", "k=8"]
    made = []
    ranks = options.ranks
    groups = {name: groups_of(kind[0], ranks) for name, kind in TIMED.items()}
    common = {**OPTIONS, "tensor_parallel_size": ranks, "kv_cache_dtype": options.cache_dtype}
    for job in jobs(TIMED, groups, model, common, options.work):
        if job["name"] not in names:
            continue
        page = options.stock_page if job["profile"] is None else options.page
        job["options"] = job["options"] | ({} if page is None else {"block_size": page})
        job["warm"] = options.mode == "warm"
        if job["warm"]:  # beside the other engines: just the cache that one request needs
            job["options"] |= {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 5 * 2**30}
        prefix = "warm" if job["warm"] else "serving"
        job["result"] = str(options.out / f"{prefix}-{label(job['name'])}.json")
        job["until"] = until
        job["parts"] = options.part
        made.append(job)
    return made


def run_all(options: argparse.Namespace) -> bool:
    """Run the jobs: at once if they only warm, else one by one. Whether all ended well."""
    made = chosen_jobs(options)

    def run(job: dict[str, Any]) -> bool:
        job["until"] = time.time() + options.limit - 40  # a part that has begun is ended
        return in_process(__file__, options.mode, job, options.work, options.limit)

    with ThreadPoolExecutor(len(made) if options.mode == "warm" else 1) as pool:
        return all(list(pool.map(run, made)))


def table(folder: Path) -> None:
    """Print all results in a folder, with what they gain on the stock engine's."""
    found = {path.stem.removeprefix("serving-"): json.loads(path.read_text())
             for path in sorted(folder.glob("serving-*.json"))}  # fmt: skip
    stock = found.get(STOCK)

    def gain(value: float, other: float | None, more_is_better: bool) -> str:
        if not other:
            return ""
        return f" ({value / other if more_is_better else other / value:.3f}x)"

    for name, result in found.items():
        against = stock if stock is not None and name != STOCK else {}
        tokens, base = result["capacity"]["tokens"], against.get("capacity", {}).get("tokens")
        page = result["capacity"]["page"]
        print(f"{name}: {tokens:,} tokens{gain(tokens, base, True)}, pages of {page}")
        for case, times in result["cases"].items():
            other = against.get("cases", {}).get(case) or {}
            parts = [
                f"{text} {times[key]:,.2f} ms{gain(times[key], other.get(key), False)}"
                for key, text in TIMES.items()
            ]
            fits = "" if times["fits"] else " (more than the cache holds)"
            print(f"  {case}{fits}: {', '.join(parts)}")
        for load, rates in result["throughput"].items():
            other = against.get("throughput", {}).get(load, {})
            parts = [
                f"{text} {rates[key]:,.0f}{gain(rates[key], other.get(key), True)}"
                for text, key in (
                    ("all", "output_tokens_s"),
                    ("saturated", "saturated_output_tokens_s"),
                )
            ]
            print(f"  {load}, output tokens/s: {', '.join(parts)}")


def main() -> None:
    """Warm, time, or run one job of these; or print results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["warm", "time", "table"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/serving"), help="models and logs")
    parser.add_argument("--out", type=Path, default=Path("serving"), help="folder of the results")
    parser.add_argument("--only", action="append", choices=[STOCK, *TIMED], help="repeatable")
    parser.add_argument("--page", type=int, default=64, help="tokens of a page, with clusters")
    parser.add_argument("--stock-page", type=int, help="the same without; default: vLLM's")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, for tensor parallelism")
    parser.add_argument("--cache-dtype", default="auto", help="of K and V; fp8 for 8 bits")
    parser.add_argument("--part", action="append", help="a case or load; repeatable; default: all")
    parser.add_argument("--limit", type=float, default=180, help="seconds of an engine")
    parser.add_argument("--job", help="one job, in this process")
    options = parser.parse_args()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    if options.job:
        run_job(json.loads(options.job))
    elif options.mode == "table":
        table(options.out)
    else:
        sys.exit(0 if run_all(options) else 1)


if __name__ == "__main__":
    main()
