"""Clustered heads in vLLM on a GPU against vLLM as it is: the same tokens.

A small random model, in which whole groups of heads have the same W_Q and W_K, loses nothing by
clusters: its tokens are the stock engine's. Profiles with streaming heads lose something, so theirs
are those of the Transformers runtime. In float32 tokens have to be the same, but for near ties. In
bfloat16 rounding alone changes them; the log-probabilities up to a request's first difference must
differ no more than with ``k=H``. All engines of a variant run at the same time, each with a small
cache.

    python benchmarks/serving_check.py run --work /tmp/serving
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from chai_attention.profile import ClusterProfile
from parts import Parts, load_parts
from serving_jobs import STOCK, engine, in_process, label, params

# 4 layers of 8 heads in 3 groups of equal heads
GROUPS = [0, 1, 0, 2, 1, 0, 2, 0]
STREAMING = [3, 6]  # those of one group, on both of two ranks


class Checked(NamedTuple):
    """A kind of profile: clusters per layer, membership, recent window, whether heads stream."""

    clusters: list[int]
    membership: str
    recent: int = 0
    streams: bool = False


CHECKED = {
    "k=H": Checked([8] * 4, "static"),
    "static": Checked([3, 3, 8, 3], "static"),
    "online": Checked([3, 3, 8, 3], "online"),
    "static window": Checked([3, 3, 8, 3], "static", 16),
    "online window": Checked([3, 3, 8, 3], "online", 16),
    "streaming": Checked([2, 2, 8, 2], "static", 40, streams=True),
    "streaming only": Checked([6, 6, 8, 6], "static", 128, streams=True),
    "streaming online": Checked([2, 2, 8, 2], "online", 40, streams=True),
}
RUNTIME = ", by transformers"  # behind the name of a kind
NEW = 32  # tokens of each answer
COMMON = {
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 2**30,
    "block_size": 64,
}
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
PLAIN = {"enable_prefix_caching": False, **COMMON}
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16, chunks": {**PLAIN, **GRAPHS, "max_num_batched_tokens": 256},
    "float32": {**PLAIN, **GRAPHS, "dtype": "float32", "max_num_batched_tokens": 4096},
    "float32, prefix caching": {
        **COMMON, "dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 1024,
    },
    "bfloat16, compiled": {**PLAIN, "max_num_batched_tokens": 4096},
    "bfloat16, cache of fp8": {
        **PLAIN, **GRAPHS, "kv_cache_dtype": "fp8", "max_num_batched_tokens": 256,
    },
}  # fmt: skip

# vLLM's attention for float32, the stock engine's there, else multiplies in TF32
PRECISE = {"TRITON_F32_DEFAULT": "ieee"}


def profile(kind: Checked) -> dict[str, Any]:
    """A profile; heads of a group share scores where a layer has fewer clusters than heads."""
    every = list(range(len(GROUPS)))
    streaming = STREAMING if kind.streams else []
    first = [head if head in streaming else GROUPS.index(GROUPS[head]) for head in every]
    found: dict[str, Any] = {"clusters": kind.clusters, "membership": kind.membership}
    if kind.streams:
        found["streaming"] = [[] if k == len(every) else streaming for k in kind.clusters]
    if kind.membership == "static":
        keeps = [k + len(streaming) >= len(every) for k in kind.clusters]
        found["representatives"] = [every if all_own else first for all_own in keeps]
    else:
        # what requests too short to tell fall back on
        alike = [[float(a == b) for b in GROUPS] for a in GROUPS]
        found["similarity"] = [alike] * len(kind.clusters)
    if kind.recent:
        found |= {"recent": kind.recent, "sinks": 4}
    return found


def write_small(folder: Path) -> None:
    """Write a random model of 4 layers in which heads of a group have the same W_Q and W_K."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=4, vocab_size=512,
        num_attention_heads=len(GROUPS), head_dim=64, initializer_range=0.06,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    first = [GROUPS.index(group) for group in GROUPS]
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                rows = weight.view(len(GROUPS), 64, -1)
                rows.copy_(rows[first].clone())
        model.lm_head.weight *= 3
    model.save_pretrained(folder)


def jobs(
    kinds: dict[str, Checked], model: Path, options: dict[str, Any], work: Path
) -> list[dict[str, Any]]:
    """The stock engine's job, those of all profiles, and of the Transformers runtime."""
    common = {"model": str(model), "options": options, "own": True}
    made: list[dict[str, Any]] = [{**common, "name": STOCK, "profile": None}]
    for name, kind in kinds.items():
        path = work / f"profile-{label(name)}.json"
        ClusterProfile.from_json(profile(kind)).save(path)
        made.append({**common, "name": name, "profile": str(path)})
        if kind.streams:
            made.append({**common, "name": f"{name}{RUNTIME}", "profile": str(path)})
    return made


def run_job(job: dict[str, Any]) -> None:
    """Tokens and log-probabilities of prompts of many lengths, in two batches."""
    random.seed(1)
    sizes = [1, 2, 7, 40, 65, 128, 300, 700, 1500, 33, 90, 5]
    prompts = [[random.randrange(3, 512) for _ in range(size)] for size in sizes]
    prompts += [prompts[8][:600], prompts[8][:1000]]  # hit the cached prefix, if there is one
    run = by_transformers if job["name"].endswith(RUNTIME) else by_engine
    found = run(job, [prompts[:12], prompts[4:]])
    Parts(Path(job["result"]), {"job": job}).add("requests", found)


def by_engine(job: dict[str, Any], batches: list[list[list[int]]]) -> list[dict[str, Any]]:
    """What vLLM generates."""
    llm, found = engine(job), []
    for batch in batches:
        prompts = [{"prompt_token_ids": ids} for ids in batch]
        for request in llm.generate(prompts, params(NEW, logprobs=0), use_tqdm=False):
            out = request.outputs[0]
            chances = [next(iter(step.values())).logprob for step in out.logprobs]
            found.append({"ids": list(out.token_ids), "logprobs": chances})
    return found


def by_transformers(job: dict[str, Any], batches: list[list[list[int]]]) -> list[dict[str, Any]]:
    """What the Transformers runtime generates, one prompt after the other."""
    import torch
    from transformers import AutoModelForCausalLM

    from chai_attention.integrations.transformers import enabled

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job["options"]["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval().to(device)
    found = []
    with enabled(model, ClusterProfile.load(job["profile"])):
        for prompt in (prompt for batch in batches for prompt in batch):
            ids = torch.tensor([prompt], device=device)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                min_new_tokens=NEW, eos_token_id=None, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            new = out.sequences[0, len(prompt) :].tolist()
            scores = torch.cat(out.logits).float().log_softmax(1)
            chances = [float(row[token]) for row, token in zip(scores, new, strict=True)]
            found.append({"ids": new, "logprobs": chances})
    return found


def kinds_of(ranks: int) -> dict[str, Checked]:
    """Kinds of profiles for so many ranks, each of which finds all groups among its own heads."""
    if ranks == 1:
        return CHECKED
    found = {}
    for name, kind in CHECKED.items():
        if name == "k=H":  # vLLM's own attention would run
            continue
        least = min(kind.clusters) * (ranks if kind.membership == "online" else 1)
        found[name] = kind._replace(clusters=[least] * len(kind.clusters))
    return found


def check(
    work: Path, only: list[str] | None, variants: list[str], limit: float, ranks: int, cards: int
) -> bool:
    """Compare all kinds of profiles with their references; print and return whether they agree.

    The stock engine has one rank, the others ``ranks``.
    """
    model = work / "small"
    if not (model / "model.safetensors").exists():
        write_small(model)
    found = [
        _variant(work, model, only, name, limit, ranks, cards) for name in variants or VARIANTS
    ]
    return all(found)


def _variant(
    work: Path,
    model: Path,
    only: list[str] | None,
    variant: str,
    limit: float,
    ranks: int,
    cards: int,
) -> bool:
    options = VARIANTS[variant]
    exact = options["dtype"] == "float32"
    chosen = []
    for job in jobs(kinds_of(ranks), model, options, work):
        name = job["name"]
        if name != STOCK and only and name.removesuffix(RUNTIME) not in only:
            continue
        job["result"] = str(work / f"check-{label(variant)}-{label(name)}.json")
        Path(job["result"]).unlink(missing_ok=True)
        if name != STOCK:
            job["options"] = {**options, "tensor_parallel_size": ranks}
        elif exact:  # FlashAttention has no float32
            job["options"] = {**options, "attention_backend": "TRITON_ATTN"}
        chosen.append(job)

    def run(job: dict[str, Any]) -> dict[str, Any] | None:
        settings = dict(PRECISE) if exact else {}
        if ranks == 1 and cards > 1:
            settings["CUDA_VISIBLE_DEVICES"] = str(chosen.index(job) % cards)
        if not in_process(__file__, "run", job, work, limit, settings):
            return None
        return load_parts(Path(job["result"]))

    with ThreadPoolExecutor(len(chosen)) as pool:
        found = dict(zip([job["name"] for job in chosen], pool.map(run, chosen), strict=True))
    good, noise = True, 0.0
    for name in [name for name in found if name in CHECKED]:
        wanted, result = found.get(f"{name}{RUNTIME}", found[STOCK]), found[name]
        if result is None or wanted is None:
            good = False
            continue
        agree, mean = compare(wanted["requests"], result["requests"])
        if name == "k=H":
            noise = mean
        fine = agree > 0.97 if exact else mean < max(2 * noise, 0.02)
        good = good and fine
        print(
            f"{variant:24} {name:16} same tokens {agree:6.1%}, log-probabilities differ by "
            f"{mean:.4f}: {'ok' if fine else 'WRONG'}",
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


def main() -> None:
    """Check everything that is asked for, or run one job of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["run"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/serving"), help="models and logs")
    parser.add_argument("--only", action="append", choices=CHECKED, help="repeatable")
    parser.add_argument("--variant", action="append", default=[], choices=VARIANTS)
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, for tensor parallelism")
    parser.add_argument("--cards", type=int, default=1, help="GPUs that engines are dealt to")
    parser.add_argument("--limit", type=float, default=150, help="seconds of an engine")
    parser.add_argument("--job", help="one job, in this process")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.job:
        run_job(json.loads(options.job))
    else:
        good = check(
            options.work, options.only, options.variant, options.limit, options.ranks, options.cards
        )
        sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
