"""Serving of LLaMA-7B's shape on one GPU: vLLM with FlashAttention against clustered heads.

Random weights, bfloat16, CUDA graphs, prefix caching off. Every engine runs in a process of its
own. ``check`` comes first: a small random model in which whole groups of heads have the same W_Q
and W_K, so that clustering them changes nothing, must give the stock engine's tokens. ``time``
then measures K,V capacity, time to first token (all rows of the batch), time per output token, and
the throughput of many requests at once: lengths like those of chats, and long prompts.

    python benchmarks/serving.py check --work /tmp/serving
    python benchmarks/serving.py time --work /tmp/serving --out serving.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES = [(1, 2048), (1, 8192), (16, 2048), (16, 8192)]
NEW_TOKENS = 65  # the first one and 64 steps
REPEATS = 2
GRAPHS = [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]
# requests that come at once: "chats" have log-normal lengths, of ShareGPT's order
LOADS = {"chats": 384, "long prompts": 40}
SEVEN_B = 32  # layers, and heads of each
STOCK = "stock"
# name: clusters per layer, membership, exact recent window
TIMED: dict[str, tuple[list[int], str, int]] = {
    "published": ([32] * 18 + [4] * 14, "static", 0),
    "k=8": ([8] * SEVEN_B, "static", 0),
    "published online": ([32] * 18 + [4] * 14, "online", 0),
    "k=8 window": ([8] * SEVEN_B, "static", 32),
}
# of the small model: 4 layers of 8 heads in 3 groups of equal heads
GROUPS = [0, 1, 0, 2, 1, 0, 2, 0]
CHECKED: dict[str, tuple[list[int], str, int]] = {
    "k=H": ([8] * 4, "static", 0),
    "static": ([3, 3, 8, 3], "static", 0),
    "online": ([3, 3, 8, 3], "online", 0),
    "static window": ([3, 3, 8, 3], "static", 16),
    "online window": ([3, 3, 8, 3], "online", 16),
}
SMALL = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}


def profile(clusters: list[int], membership: str, recent: int, groups: list[int]) -> dict[str, Any]:
    """A profile; ``groups`` gives each head's cluster where a layer has fewer than heads."""
    first = [groups.index(group) for group in groups]
    heads = len(groups)
    found: dict[str, Any] = {"clusters": clusters, "membership": membership}
    if membership == "static":
        found["representatives"] = [list(range(heads)) if k == heads else first for k in clusters]
    else:
        # what requests too short to tell fall back on
        alike = [[float(a == b) for b in groups] for a in groups]
        found["similarity"] = [alike] * len(clusters)
    if recent:
        found |= {"recent": recent, "sinks": 4}
    return found


def write_model(folder: Path, small: bool) -> None:
    """Write a config, and weights for the small model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not small:
        LlamaConfig(
            architectures=["LlamaForCausalLM"], dtype="bfloat16", max_position_embeddings=16384
        ).save_pretrained(folder)
        return
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_attention_heads=8, head_dim=64, initializer_range=0.06)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                rows = weight.view(8, 64, -1)
                rows.copy_(rows[[GROUPS.index(group) for group in GROUPS]].clone())
        model.lm_head.weight *= 3
    model.save_pretrained(folder)


def engine(job: dict[str, Any]) -> Any:
    """Start vLLM for a job."""
    from vllm import LLM

    options = dict(job["options"])
    if job["profile"] is not None:
        from chai_attention.integrations.vllm import register

        register()  # vLLM finds it by itself where the package is installed, not on PYTHONPATH only
        options["attention_backend"] = "CUSTOM"
        options["additional_config"] = {"chai": {"profile": job["profile"]}}
        if job.get("own"):
            from chai_attention.integrations.vllm import impl

            impl.stock_backend = lambda *args: None  # also layers without clusters run our kernels
    start = time.perf_counter()
    llm = LLM(
        job["model"],
        skip_tokenizer_init=True,
        **{"dtype": "bfloat16", "gpu_memory_utilization": 0.9, **options},
    )
    print(f"the engine started in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return llm


def params(count: int, **more: Any) -> Any:
    """Greedy sampling of ``count`` tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **more
    )


def capacity(llm: Any) -> dict[str, int]:
    """Pages and tokens of the K,V cache."""
    cache = llm.llm_engine.vllm_config.cache_config
    return {"blocks": cache.num_gpu_blocks, "tokens": cache.num_gpu_blocks * cache.block_size}


def run_check(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log-probabilities of prompts of many lengths, in two batches."""
    llm = engine(job)
    random.seed(1)
    sizes = [1, 2, 7, 40, 65, 128, 300, 700, 1500, 33, 90, 5]
    prompts = [[random.randrange(3, 512) for _ in range(size)] for size in sizes]
    prompts += [prompts[8][:600], prompts[8][:1000]]  # hit the cached prefix, if there is one
    found = []
    for batch in (prompts[:12], prompts[4:]):
        done = llm.generate(
            [{"prompt_token_ids": ids} for ids in batch], params(32, logprobs=0), use_tqdm=False
        )
        for request in done:
            out = request.outputs[0]
            chances = [next(iter(step.values())).logprob for step in out.logprobs]
            found.append({"ids": list(out.token_ids), "logprobs": chances})
    return {"requests": found, **capacity(llm)}


def run_time(job: dict[str, Any]) -> dict[str, Any]:
    """Times of all cases, medians of `REPEATS`."""
    llm = engine(job)
    results = {}
    for batch, length in CASES:
        random.seed(batch * length)
        times: dict[int, list[float]] = {1: [], NEW_TOKENS: []}
        for _ in range(REPEATS + 1):
            for count, spent in times.items():
                prompts = [
                    {"prompt_token_ids": [random.randrange(3, 32000) for _ in range(length)]}
                    for _ in range(batch)
                ]
                start = time.perf_counter()
                llm.generate(prompts, params(count), use_tqdm=False)
                spent.append(time.perf_counter() - start)
        first, all_ = (statistics.median(spent[1:]) for spent in times.values())
        results[f"{batch} x {length}"] = {
            "ttft_ms": round(first * 1e3, 2),
            "tpot_ms": round((all_ - first) / (NEW_TOKENS - 1) * 1e3, 3),
        }
    return {"cases": results, "throughput": throughput(llm), **capacity(llm)}


def loads(name: str) -> list[tuple[int, int]]:
    """Tokens of each request's prompt and output, the same in every run."""
    chosen = random.Random(7)
    count = LOADS[name]
    if name == "chats":
        drawn = [
            (chosen.lognormvariate(4.7, 1.1), chosen.lognormvariate(5.0, 0.7)) for _ in range(count)
        ]
        return [(max(4, min(2048, int(a))), max(4, min(1024, int(b)))) for a, b in drawn]
    return [(chosen.randint(4096, 7600), chosen.randint(256, 512)) for _ in range(count)]


def throughput(llm: Any) -> dict[str, dict[str, float]]:
    """Tokens per second with more requests waiting than run."""
    found = {}
    for name in LOADS:
        sizes = loads(name)
        random.seed(3)
        prompts = [
            {"prompt_token_ids": [random.randrange(3, 32000) for _ in range(length)]}
            for length, _ in sizes
        ]
        start = time.perf_counter()
        llm.generate(prompts, [params(count) for _, count in sizes], use_tqdm=False)
        spent = time.perf_counter() - start
        read, written = (sum(each) for each in zip(*sizes, strict=True))
        found[name] = {
            "seconds": round(spent, 2),
            "output_tokens_s": round(written / spent, 1),
            "all_tokens_s": round((read + written) / spent, 1),
        }
    return found


def in_process(mode: str, job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Run a job in a fresh process; what vLLM says goes to a log beside the results."""
    name = f"{mode}-{job['name']}".replace(" ", "-").replace("=", "")
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, mode, "--work", str(work), "--job", json.dumps(job)]
    with (work / f"{name}.log").open("w") as log:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        tail = (work / f"{name}.log").read_text()[-3000:]
        raise SystemExit(f"{name} failed:\n{done.stdout[-1500:]}\n{tail}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return found


def jobs(
    kinds: dict[str, tuple[list[int], str, int]],
    groups: list[int],
    model: Path,
    options: dict[str, Any],
    work: Path,
) -> list[dict[str, Any]]:
    """The stock engine's job and those of all profiles."""
    made = [{"name": STOCK, "model": str(model), "profile": None, "options": options}]
    for name, (clusters, membership, recent) in kinds.items():
        path = work / f"profile-{name.replace(' ', '-').replace('=', '')}.json"
        path.write_text(json.dumps(profile(clusters, membership, recent, groups)))
        made.append({"name": name, "model": str(model), "profile": str(path), "options": options})
    return made


def check(work: Path, only: list[str] | None, variants: list[str]) -> bool:
    """Compare all kinds of profiles with the stock engine; print and return whether they agree.

    In float32 tokens have to be the same, but for near ties. In bfloat16 rounding alone changes
    them; the log-probabilities of the first tokens must differ no more than with ``k=H``.
    """
    model = work / "small"
    if not (model / "model.safetensors").exists():
        write_model(model, small=True)
    common = {"max_model_len": 2048, "max_num_seqs": 16, "gpu_memory_utilization": 0.3}
    decode_graphs = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    plain = {"enable_prefix_caching": False, **common}
    every: dict[str, dict[str, Any]] = {
        "float32": {**plain, **decode_graphs, "dtype": "float32", "max_num_batched_tokens": 4096},
        "bfloat16, chunks": {**plain, **decode_graphs, "max_num_batched_tokens": 256},
        "float32, prefix caching": {
            **common, "dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 1024,
        },
        "bfloat16, compiled": {**plain, "max_num_batched_tokens": 4096},
    }  # fmt: skip
    good = True
    for variant in variants or list(every):
        options = every[variant]
        exact = options.get("dtype") == "float32"
        reference: dict[str, Any] = {}
        noise = 0.0
        for job in jobs(CHECKED, GROUPS, model, options, work):
            if job["name"] == STOCK:
                if exact:  # FlashAttention has no float32
                    job["options"] = {**options, "attention_backend": "TRITON_ATTN"}
                reference = in_process("check", job, work)
                continue
            if only and job["name"] not in only:
                continue
            if "window" in job["name"] and "prefix" in variant:
                continue
            job["own"] = True
            found = in_process("check", job, work)
            agree, mean = compare(reference["requests"], found["requests"])
            if job["name"] == "k=H":
                noise = mean
            fine = agree > 0.97 if exact else mean < max(2 * noise, 0.02)
            good = good and fine
            print(
                f"{variant:24} {job['name']:14} same tokens {agree:6.1%}, log-probabilities differ "
                f"by {mean:.4f}: {'ok' if fine else 'WRONG'}",
                flush=True,
            )
    return good


def compare(wanted: list[dict[str, Any]], found: list[dict[str, Any]]) -> tuple[float, float]:
    """Share of tokens up to each request's first difference, and their mean logprob difference."""
    total = 0
    differences = []
    for one, other in zip(wanted, found, strict=True):
        total += len(one["ids"])
        for a, b, p, q in zip(
            one["ids"], other["ids"], one["logprobs"], other["logprobs"], strict=True
        ):
            if a != b:  # later tokens then differ
                break
            differences.append(abs(p - q))
    return len(differences) / total, statistics.mean(differences or [9.9])


def measure(work: Path, only: list[str] | None, out: Path | None, page: int) -> None:
    """Time the stock engine and all kinds; print a table and write JSON."""
    model = work / "seven"
    write_model(model, small=False)
    options = {
        "load_format": "dummy",
        "max_model_len": 8192 + 128,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 16384,
        "enable_prefix_caching": False,
        "block_size": page,
        # an engine starts sooner with few graphs; batches between them run in the next larger one
        "compilation_config": {"cudagraph_capture_sizes": GRAPHS},
    }
    groups = [head % 8 for head in range(SEVEN_B)]
    rows: dict[str, Any] = {}
    for job in jobs(TIMED, groups, model, options, work):
        if only and job["name"] not in only:
            continue
        if job["name"].startswith("published") and job["profile"]:
            clusters, membership, recent = TIMED[job["name"]]
            four = [head % 4 for head in range(SEVEN_B)]
            Path(job["profile"]).write_text(json.dumps(profile(clusters, membership, recent, four)))
        rows[job["name"]] = in_process("time", job, work)
        cases = rows[job["name"]]["cases"]
        print(f"{job['name']:18} {rows[job['name']]['tokens']:>9,} tokens  ", end="")
        print(
            "  ".join(
                f"{case}: {c['ttft_ms']:.1f} / {c['tpot_ms']:.2f} ms" for case, c in cases.items()
            ),
            flush=True,
        )
        stock = rows.get(STOCK)
        if stock and job["name"] != STOCK:
            ratios = [
                f"{case}: {stock['cases'][case]['ttft_ms'] / c['ttft_ms']:.2f}x / "
                f"{stock['cases'][case]['tpot_ms'] / c['tpot_ms']:.2f}x"
                for case, c in cases.items()
            ]
            gain = rows[job["name"]]["tokens"] / stock["tokens"]
            print(f"{'':18} {gain:>8.3f}x         {'  '.join(ratios)}", flush=True)
        for load, found in rows[job["name"]]["throughput"].items():
            ratio = ""
            if stock:
                gain = found["output_tokens_s"] / stock["throughput"][load]["output_tokens_s"]
                ratio = f", {gain:.3f}x"
            print(f"{'':18} {load}: {found['output_tokens_s']:,.0f} output tokens/s{ratio}")
        if out is not None:
            import torch
            import vllm

            about = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "vllm": vllm.__version__,
                "model": "LLaMA-7B shape, random weights, bfloat16",
                "options": options,
            }
            out.write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")


def main() -> None:
    """Check or time, or run one job of these."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["check", "time"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/serving"), help="models and logs")
    parser.add_argument("--only", action="append", help="names of profiles, or stock; repeatable")
    parser.add_argument("--variant", action="append", default=[], help="of `check`; repeatable")
    parser.add_argument("--page", type=int, default=16, help="tokens of a page, of all engines")
    parser.add_argument("--out", type=Path, help="JSON of `time`")
    parser.add_argument("--job", help="one job, in this process")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.job:
        run = run_check if options.mode == "check" else run_time
        print("RESULT " + json.dumps(run(json.loads(options.job))))
    elif options.mode == "check":
        sys.exit(0 if check(options.work, options.only, options.variant) else 1)
    else:
        measure(options.work, options.only, options.out, options.page)


if __name__ == "__main__":
    main()
