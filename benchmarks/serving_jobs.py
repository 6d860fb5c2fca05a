"""Engines for the serving benchmarks, each in a process of its own; models and profiles for them.

A job is a dictionary: ``name``, ``model`` (a folder), ``profile`` (a file, or None for vLLM as it
is), ``own`` (layers without clusters run our attention, too) and ``options`` of the engine. A
script runs itself once for each job, so that an engine's memory is freed with its process. Compiled
graphs and kernels are kept in the work folder, where the next process finds them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

STOCK = "stock"
Kinds = dict[str, tuple[list[int], str, int]]  # name: clusters per layer, membership, recent window


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


def write_config(folder: Path) -> None:
    """Write the config of LLaMA-7B's shape, for random weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", max_position_embeddings=16384
    ).save_pretrained(folder)


def write_small(folder: Path, groups: list[int]) -> None:
    """Write a random model of 4 layers in which heads of a group have the same W_Q and W_K.

    Clustering them changes nothing, so its tokens must be those of the stock engine.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=4, vocab_size=512,
        num_attention_heads=len(groups), head_dim=64, initializer_range=0.06,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    first = [groups.index(group) for group in groups]
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                rows = weight.view(len(groups), 64, -1)
                rows.copy_(rows[first].clone())
        model.lm_head.weight *= 3
    model.save_pretrained(folder)


def engine(job: dict[str, Any]) -> Any:
    """Start vLLM for a job, in this process."""
    from vllm import LLM

    options = dict(job["options"])
    if job["profile"] is not None:
        from chai_attention.integrations.vllm import register

        register()  # vLLM finds it by itself where the package is installed, not on PYTHONPATH only
        options["attention_backend"] = "CUSTOM"
        options["additional_config"] = {"chai": {"profile": job["profile"]}}
        if job.get("own"):
            from chai_attention.integrations.vllm import stock

            stock.stock_backend = lambda *args: None
    start = time.perf_counter()
    llm = LLM(job["model"], skip_tokenizer_init=True, **{"dtype": "bfloat16", **options})
    progress(f"engine started in {time.perf_counter() - start:.0f} s")
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
    return {
        "page": cache.block_size,
        "blocks": cache.num_gpu_blocks,
        "tokens": cache.num_gpu_blocks * cache.block_size,
    }


def progress(text: str) -> None:
    """Tell the parent process, which prints it."""
    print(f"PROGRESS {text}", flush=True)


def in_process(
    script: str,
    mode: str,
    job: dict[str, Any],
    work: Path,
    limit: float,
    settings: dict[str, str] | None = None,
) -> bool:
    """Run a job by ``script`` in a fresh process, which needs the environment's ``settings``.

    What vLLM says goes to a log in ``work``.

    Returns:
        Whether it ended well within ``limit`` seconds.
    """
    name = label(f"{mode}-{job['name']}")
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        **compile_caches(work),
        **os.environ,
        **(settings or {}),
    }
    command = [sys.executable, script, mode, "--work", str(work), "--job", json.dumps(job)]
    log = work / f"{name}.log"
    start = time.perf_counter()
    with log.open("w") as file:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
        )
        timer = threading.Timer(limit, child.kill)
        timer.start()
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("PROGRESS "):
                print(f"{name}: {line.removeprefix('PROGRESS ').rstrip()}", flush=True)
            else:
                file.write(line)
        code = child.wait()
        timer.cancel()
    spent = time.perf_counter() - start
    print(f"{name}: {'done' if code == 0 else f'FAILED ({code})'} in {spent:.0f} s", flush=True)
    if code:
        print(log.read_text()[-4000:], flush=True)
    return code == 0


def compile_caches(work: Path) -> dict[str, str]:
    """Settings with which compiled graphs and kernels are kept in a folder."""
    folders = {
        "VLLM_CACHE_ROOT": "vllm",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }
    return {key: str(work / "cache" / name) for key, name in folders.items()}


def label(name: str) -> str:
    """A name as part of a file's."""
    return name.replace(" ", "-").replace("=", "").replace(",", "")


def jobs(
    kinds: Kinds, groups: dict[str, list[int]], model: Path, options: dict[str, Any], work: Path
) -> list[dict[str, Any]]:
    """The stock engine's job and those of all profiles."""
    made = [{"name": STOCK, "model": str(model), "profile": None, "options": options}]
    for name, (clusters, membership, recent) in kinds.items():
        path = work / f"profile-{label(name)}.json"
        path.write_text(json.dumps(profile(clusters, membership, recent, groups[name])))
        made.append({"name": name, "model": str(model), "profile": str(path), "options": options})
    return made
