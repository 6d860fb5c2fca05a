"""Serving on a GPU: vLLM with its own attention against clustered and streaming heads.

Random weights, bfloat16, torch.compile and CUDA graphs as vLLM has them, prefix caching on. Every
engine runs in a process of its own, its scheduler and model in a second one, as vLLM does it. It
measures, in this order: K,V capacity; bytes and operations per second of the GPU, at which tables
tell the ideal; time to first token (of all rows of a batch) and time per output token (of steps in
which all rows decode); throughput with more requests waiting than run, of lengths like those of
chats and of long prompts; chats behind one system prompt, with hits in the prefix cache and
without. With several cards as many engines run at the same time; models that need several cards
("33b ...", "66b ...") take --ranks. Results are written after each part; a run leaves out the parts
that a file has already.

    python benchmarks/serving.py time --work /tmp/serving --out results --cards 2
    python benchmarks/serving.py time --out results --only stock --only default --part chats
    python benchmarks/serving.py time --cards 2 --ranks 2 --out large --only "66b stock"
    python benchmarks/serving.py table --out results
    python benchmarks/serving.py time --tiny --out /tmp/tiny       # on a CPU, to try the script
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from parts import Parts
from serving_jobs import capacity, engine, in_process, kind_jobs, label, on_cards, progress
from serving_kinds import KINDS, SHAPES, TINY
from serving_loads import SHARED, Case, Scale, run_case, scale_of, shared_prompt
from serving_loads import throughput as measure_throughput
from serving_rates import measure_rates
from serving_table import table

PAGE = 64  # tokens, as `chai serve` has it
# an engine starts sooner with few graphs; batches between them run in the next larger one. Those
# beyond ``max_num_seqs`` are of steps that hold prompts: what lies between their attention
GRAPHS = [
    1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 704, 768, 896, 1024, 1152, 1280,
    1408, 1536, 1792, 2048,
]  # fmt: skip
MIXED = 1408  # tokens of prompts in such a step, for which there are graphs
# Bytes of the GPU that vLLM does not plan with. It plans with the largest step's activations, of
# which PyTorch keeps more (fragments between batches of unequal sizes, 450 MiB by a simulation),
# and without kernels that are loaded later. With 400 MiB an engine that had served several loads
# ended with CUBLAS_STATUS_EXECUTION_FAILED, its CUDA context unharmed. Stock's OPT-66B on one card
# needs 3 GiB: by its code, FlashAttention's splits of a step of 1,536 tokens take 1.7
SPARE = 2**30
CONTEXT = 600 * 2**20  # more of them: an engine's CUDA context comes after this script looked
FIRST = ["stock", "default", "published online", "k=8 window", "streaming half", "published"]


def engine_options(scale: Scale) -> dict[str, Any]:
    """What all engines are started with."""
    return {
        "load_format": "dummy",
        "max_model_len": scale.longest,
        "max_num_seqs": scale.most,
        "max_num_batched_tokens": scale.budget,
        "compilation_config": {
            "cudagraph_capture_sizes": [n for n in GRAPHS if n <= scale.most + MIXED]
        },
    }


class Results(Parts):
    """One engine's results."""

    def add(self, part: str, value: Any, within: str | None = None) -> None:
        """Keep a part and tell of it."""
        super().add(part, value, within)
        short = value
        if isinstance(value, dict):
            short = {key: each for key, each in value.items() if key not in ("runs", "groups")}
        progress(f"{part}: {json.dumps(short)}")


def card() -> tuple[str, int, int]:
    """Name, free and total bytes of the first visible GPU, without a CUDA context here."""
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    handle = pynvml.nvmlDeviceGetHandleByIndex(int(first))
    found = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return pynvml.nvmlDeviceGetName(handle), found.free, found.total


def utilization(free: int, total: int, spare: int = SPARE) -> float:
    """The share that vLLM may take of a GPU of ``total`` bytes, of which so many are free."""
    return int((free - spare - CONTEXT) / total * 1000) / 1000


def memory(worker: Any) -> dict[str, int]:
    """What the GPU of a vLLM worker has free and PyTorch holds, now and at most, in MiB.

    And ``retries``: how often PyTorch had to give back what it kept, as the GPU had no more.
    """
    import torch

    held = torch.cuda.memory_stats()
    return {
        "free": torch.cuda.mem_get_info()[0] >> 20,
        "reserved": held.get("reserved_bytes.all.current", 0) >> 20,
        "most_reserved": held.get("reserved_bytes.all.peak", 0) >> 20,
        "retries": held.get("num_alloc_retries", 0),
    }


def run_job(job: dict[str, Any]) -> None:
    """Measure what is asked for and not there yet with one engine."""
    import torch
    import vllm

    options, tiny = job["options"], job["tiny"]
    device, free, total = ("CPU", 0, 1) if tiny else card()
    about = {
        "device": device,
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "tiny": tiny,
        "options": dict(options),
    }
    kind = KINDS[job["name"]]
    scale = scale_of(kind.model, tiny)
    vocabulary = (TINY if tiny else SHAPES)[kind.model].vocabulary
    results = Results(Path(job["result"]), about)
    results.found |= {"kind": job["name"]}
    parts = missing(scale, job, results)
    if not parts:
        progress("all is there")
        return
    if not tiny:
        options["gpu_memory_utilization"] = utilization(free, total, job["spare"])
        results.add("gpu_memory_utilization", options["gpu_memory_utilization"])
    start = time.perf_counter()
    llm = engine(job)
    results.add("start_s", round(time.perf_counter() - start, 1))
    results.add("capacity", capacity(llm, scale.context))
    if not tiny:
        results.add("rates", llm.collective_rpc(measure_rates)[0])
    try:
        measure(llm, scale, vocabulary, parts, job["until"], results)
    finally:
        if not tiny:
            results.add("memory", llm.collective_rpc(memory)[0])


def missing(scale: Scale, job: dict[str, Any], results: Results) -> list[tuple[str, str]]:
    """Parts that are asked for and not there: "cases" or "throughput", and the name."""
    for within in ("cases", "throughput"):
        results.found.setdefault(within, {})
    parts = [("cases", case.name) for case in scale.cases]
    parts += [("throughput", load) for load in scale.loads]
    wanted = job["parts"] or [name for _, name in parts]
    return [(at, name) for at, name in parts if name in wanted and name not in results.found[at]]


def measure(
    llm: Any, scale: Scale, vocabulary: int, parts: list[tuple[str, str]], until: float,
    results: Results,
) -> None:  # fmt: skip
    """Run parts one after the other, as far as there is time."""
    run_case(llm, Case(2, scale.longest // 16, 8, 1), vocabulary)  # compiled at the first call
    cases = {case.name: case for case in scale.cases}
    for within, name in parts:
        if time.time() > until:
            progress(f"no time left for {name}")
        elif within == "cases":
            results.add(name, run_case(llm, cases[name], vocabulary), within)
        elif name == SHARED:
            results.add(name, shared_prompt(llm, scale, vocabulary), within)
        else:
            results.add(name, measure_throughput(llm, name, scale, vocabulary), within)


def chosen_jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The jobs that the command line asks for."""
    made: list[dict[str, Any]] = []
    for name in options.only or FIRST:
        scale = scale_of(KINDS[name].model, options.tiny)
        common = engine_options(scale) | {"tensor_parallel_size": options.ranks}
        if options.tiny:
            del common["compilation_config"]
            common |= {"enforce_eager": True, "gpu_memory_utilization": 0.3}  # of the CPU's memory
        made += kind_jobs([name], common, options.work, options.tiny, options.ranks)
    for job in made:
        page = options.stock_page if job["profile"] is None else options.page
        job["options"] |= {} if page is None else {"block_size": page}
        job["tiny"] = options.tiny
        job["result"] = str(options.out / f"serving-{label(job['name'])}.json")
        job["parts"] = options.part
        job["spare"] = int(options.spare * 2**30)
    return made


def run_all(options: argparse.Namespace) -> bool:
    """Run the jobs, as many at a time as there are cards. Whether all ended well."""
    end = time.time() + options.total

    def run(job: dict[str, Any], settings: dict[str, str]) -> bool:
        limit = min(options.limit, end - time.time())
        if limit < 30:
            print(f"{job['name']}: no time left", flush=True)
            return False
        job["until"] = time.time() + limit - 25  # a part that has begun is ended
        settings = {**settings, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return in_process(__file__, options.mode, job, options.work, limit, settings)

    return on_cards(chosen_jobs(options), run, options.cards)


def main() -> None:
    """Time engines, or run one job of these; or print results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["time", "table"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/serving"), help="models and logs")
    parser.add_argument("--out", type=Path, default=Path("serving"), help="folder of the results")
    parser.add_argument("--only", action="append", choices=KINDS, help="repeatable, in this order")
    parser.add_argument("--page", type=int, default=PAGE, help="tokens of a page, with clusters")
    parser.add_argument("--stock-page", type=int, help="the same without; default: vLLM's")
    parser.add_argument("--cards", type=int, default=1, help="GPUs; engines run on all of them")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of an engine (tensor parallel)")
    parser.add_argument("--spare", type=float, default=SPARE / 2**30, help="GiB vLLM plans without")
    parser.add_argument("--part", action="append", help="a case or load; repeatable; default: all")
    parser.add_argument("--limit", type=float, default=300, help="seconds of an engine")
    parser.add_argument("--total", type=float, default=1e6, help="seconds of all of them")
    parser.add_argument("--tiny", action="store_true", help="narrow models: on a CPU")
    parser.add_argument("--job", help="one job, in this process")
    options = parser.parse_args()
    if options.cards < options.ranks:
        parser.error(f"--ranks {options.ranks} needs --cards {options.ranks} or more")
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    if options.job:
        run_job(json.loads(options.job))
        return
    good = options.mode == "table" or run_all(options)
    print(table(options.out), flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
