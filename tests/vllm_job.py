"""One vLLM engine per job, each in a process of its own that does not have to import vLLM anew.

A server process imports vLLM once, which takes longer than a tiny model's engine; jobs are forked
off it.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
PRELOADED = ["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "chai_attention"]
TIMEOUT = 900


def run(job: dict[str, Any], log: Path) -> dict[str, Any]:
    """Run a job in a process of its own; what vLLM says goes to ``log``.

    Args:
        job: ``model``, ``profile`` (path, or None for vLLM as it is), ``own`` (layers without
            clusters run our attention too), ``together`` (batches go to the kernels' operations, or
            on a CPU to their PyTorch versions), ``options`` of the engine, ``batches`` (prompts of
            token ids that are handed in together) and ``tokens`` to generate of each, ``n`` times.
        log: a file.

    Raises:
        RuntimeError: with the log, if the engine failed.
    """
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    process = context.Process(target=_run, args=(job, log, result))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        raise RuntimeError(f"no end after {TIMEOUT} s: {log.read_text()[-12000:]}")
    if not result.exists():
        raise RuntimeError(log.read_text()[-12000:])
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _run(job: dict[str, Any], log: Path, result: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    result.write_text(json.dumps(_generate(job)))
    sys.stdout.flush()
    os._exit(0)  # whatever vLLM would still tidy up goes with the process


def _generate(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    options = {"max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, **job["options"]}
    if job["profile"] is not None:
        options["additional_config"] = {"chai": {"profile": job["profile"]}}
        from chai_attention.integrations.vllm import impl

        if job["own"]:
            impl.stock_backend = lambda *args: None
        if job["together"]:
            impl.runs_kernels = lambda device: True
    llm = LLM(
        job["model"], skip_tokenizer_init=True, dtype="float32", disable_log_stats=False, **options
    )
    params = SamplingParams(
        # vLLM refuses several greedy samples, and drafts with a top_k
        **({"temperature": 0} if job["n"] == 1 else {"temperature": 1, "top_k": 1}),
        max_tokens=job["tokens"], ignore_eos=True, detokenize=False,
        n=job["n"],
    )  # fmt: skip
    batches = []
    for prompts in job["batches"]:
        done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        batches.append(
            {
                "ids": [[list(out.token_ids) for out in request.outputs] for request in done],
                "cached": [request.num_cached_tokens for request in done],
            }
        )
    config = llm.llm_engine.vllm_config.cache_config
    counted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    return {
        "batches": batches,
        "blocks": config.num_gpu_blocks,
        "block_size": config.block_size,
        "preemptions": sum(counted),
    }
