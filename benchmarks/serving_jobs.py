"""Engines for the serving benchmarks, each in a process of its own; models and profiles for them.

A job is a dictionary: ``name``, ``model`` (a folder), ``profile`` (a file, or None for vLLM as it
is), ``own`` (layers without clusters run our attention, too) and ``options`` of the engine. A
script runs itself once for each job, so that an engine's memory is freed with its process. Compiled
graphs and kernels are kept in the work folder, where the next process finds them.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chai_attention.profile import ClusterProfile
from serving_kinds import KINDS, SHAPES, TINY

STOCK = "stock"
# of a job's process: where it tells how far it is, and its name
TERMINAL, NAME = "CHAI_JOB_TERMINAL", "CHAI_JOB_NAME"


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
            from chai_attention.integrations.vllm import backend

            backend.native_backend = lambda *args: None
    start = time.perf_counter()
    llm = LLM(job["model"], skip_tokenizer_init=True, **options)
    progress(f"engine started in {time.perf_counter() - start:.0f} s")
    return llm


def params(count: int, **more: Any) -> Any:
    """Greedy sampling of ``count`` tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **more
    )


def capacity(llm: Any, length: int) -> dict[str, Any]:
    """The K,V cache in blocks, and how many tokens of requests of ``length`` it holds.

    Where there are several groups of pages all take theirs from the same blocks: a request has far
    pages for all its tokens and local pages for its window and its first tokens.
    """
    found: dict[str, Any] = llm.collective_rpc(_capacity, args=(length,))[0]
    return found


def _capacity(worker: Any, length: int) -> dict[str, Any]:
    """`capacity`, in a process of vLLM's."""
    cache = worker.model_runner.kv_cache_config
    groups, taken = [], 0
    for group in cache.kv_cache_groups:
        spec = group.kv_cache_spec
        spec = getattr(spec, "first_spec", spec)
        window, sinks = getattr(spec, "sliding_window", None), getattr(spec, "sinks", 0)
        pages = -(-length // spec.block_size)
        if window:
            from chai_attention.integrations.vllm.layers import local_pages_of

            pages = local_pages_of(length, spec.block_size, window, sinks)
        groups.append({"page": spec.block_size, "window": window, "pages": pages})
        taken += pages
    requests = (cache.num_blocks - 1) / taken  # one block is nobody's
    return {
        "blocks": cache.num_blocks,
        "block_bytes": cache.kv_cache_tensors[0].size // cache.num_blocks,
        "groups": groups,
        "requests": round(requests, 2),
        "tokens": int(requests * length),
    }


def progress(text: str) -> None:
    """Print to the terminal of the process that started this one; its output goes to a log."""
    terminal = os.dup(int(os.environ.get(TERMINAL, "1")))
    with os.fdopen(terminal, "w") as out:
        print(f"{os.environ.get(NAME, 'here')}: {text}", file=out)


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
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions of this script, called in an engine
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU: ranks need no NUMA nodes of their own
        "HF_HUB_OFFLINE": "1",
        **compile_caches(work),
        **os.environ,
        **(settings or {}),
    }
    command = [sys.executable, script, mode, "--work", str(work), "--job", json.dumps(job)]
    log = work / f"{name}.log"
    start = time.perf_counter()
    with log.open("w") as file:
        terminal = os.dup(1)
        environment |= {TERMINAL: str(terminal), NAME: name}
        try:
            code: int | str = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=limit,
                pass_fds=[terminal], check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = "out of time"
        finally:
            os.close(terminal)
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


def kind_jobs(
    names: Sequence[str], options: dict[str, Any], work: Path, tiny: bool = False, ranks: int = 1
) -> list[dict[str, Any]]:
    """The jobs of kinds of `serving_kinds`, in this order; their configs and profiles are written.

    Args:
        names: of the kinds.
        options: of all engines.
        work: folder for what is written.
        tiny: models with a few layers and narrow ones, for CPUs.
        ranks: GPUs of an engine.
    """
    made = []
    for name in names:
        kind = KINDS[name]
        shape = (TINY if tiny else SHAPES)[kind.model]
        model = work / (f"tiny-{kind.model}" if tiny else kind.model)
        shape.write(model, "float32" if tiny else "bfloat16")
        found, path = kind.profile(shape, ranks), None
        if found is not None:
            path = work / f"profile-{label(name)}.json"
            ClusterProfile.from_json(found).save(path)
        own = {"kv_cache_dtype": kind.cache_dtype} if kind.cache_dtype != "auto" else {}
        made.append(
            {
                "name": name,
                "model": str(model),
                "profile": None if path is None else str(path),
                "options": {**options, **own},
            }
        )
    return made


def on_cards(
    made: Sequence[dict[str, Any]], run: Callable[[dict[str, Any], dict[str, str]], bool],
    cards: int,
) -> bool:  # fmt: skip
    """Run jobs on several cards at the same time, each on the next one that is free.

    Args:
        made: the jobs; those of several ranks take so many cards.
        run: runs a job with these settings of the environment; whether all went well.
        cards: that there are.
    """
    ranks = max([1, *(job["options"].get("tensor_parallel_size", 1) for job in made)])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(cards)))
    names = visible.split(",")[:cards]
    free: queue.Queue[str] = queue.Queue()
    for start in range(0, cards - ranks + 1, ranks):
        free.put(",".join(names[start : start + ranks]))

    def one(job: dict[str, Any]) -> bool:
        mine = free.get()
        try:
            return run(job, {"CUDA_VISIBLE_DEVICES": mine})
        finally:
            free.put(mine)

    with ThreadPoolExecutor(free.qsize()) as pool:
        return all(list(pool.map(one, made)))
