"""One vLLM engine per job, each in a process of its own that does not have to import vLLM anew.

A server process imports vLLM once, which takes longer than a tiny model's engine; jobs are forked
off it. A job does several things with its engine, one after the other (`Part`).
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plain_flash import Planner, plain_flash

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

Part = dict[str, Any]


def generate(prompts: list[list[int]], tokens: int, n: int = 1, scored: bool = False) -> Part:
    """Generate ``tokens`` greedily for prompts that are handed in together, ``n`` times each.

    With ``scored`` prompts get log probabilities, for which vLLM computes all of them anew.
    """
    return {"do": "generate", "prompts": prompts, "tokens": tokens, "n": n, "scored": scored}


def beams(prompts: list[list[int]], tokens: int, width: int) -> Part:
    """The ``width`` best continuations by beam search."""
    return {"do": "beams", "prompts": prompts, "tokens": tokens, "width": width}


def abort(prompts: list[list[int]], tokens: int, at: dict[int, int]) -> Part:
    """Generate, and drop requests in flight: ``at`` has the step of each that is dropped."""
    steps = {str(row): step for row, step in at.items()}
    return {"do": "abort", "prompts": prompts, "tokens": tokens, "at": steps}


def reload(prompts: list[list[int]], tokens: int, at: int) -> Part:
    """Generate, and load the same weights anew behind step ``at``, while requests are under way."""
    return {"do": "reload", "prompts": prompts, "tokens": tokens, "at": at}


def crowd(prompts: list[list[int]], requests: list[list[int | None]]) -> Part:
    """Requests that come and go.

    Each is the number of its prompt, its tokens, the step it comes in, and the step in which its
    client leaves, or None. What pages hold before is large numbers.
    """
    return {"do": "crowd", "prompts": prompts, "requests": requests}


def score(requests: list[tuple[list[int], int]], rows: int, budget: int) -> Part:
    """Score the last tokens of rows, and write as many behind the others (`scoring.answer`).

    They come in steps as `scoring.ScoringEngine` makes them: of so many ``rows`` and tokens.
    """
    return {"do": "score", "prompts": requests, "rows": rows, "budget": budget}


def run(job: dict[str, Any], log: Path) -> dict[str, Any]:
    """Run a job in a process of its own; what vLLM says goes to ``log``.

    Args:
        job: ``model``, ``profile`` (path, or None for vLLM as it is), ``own`` (layers without
            clusters run our attention too), ``flash`` (kept heads of layers in which none shares
            run a stand-in for FlashAttention), ``scales`` of K and V in 8-bit pages as of a
            checkpoint, or None, ``options`` of the engine, ``parts``.
        log: a file.

    Returns:
        ``parts`` with what each gave, ``blocks`` and ``block_size`` of the cache, the blocks that
        are ``free`` before and behind the parts, ``preemptions``; how often layers ``copied`` 8-bit
        pages, and how often they had no room to.

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
    result.write_text(json.dumps(_do(job)))
    sys.stdout.flush()
    os._exit(0)  # whatever vLLM would still tidy up goes with the process


def _engine(job: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.v1.executor import multiproc_executor

    # ranks are forked off this process, too: on a CPU vLLM would let each import all anew
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    options = {"max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, **job["options"]}
    if job["profile"] is not None:
        options["additional_config"] = {"chai": {"profile": job["profile"]}}
        from chai_attention.integrations.vllm import flash, impl, memberships

        memberships.memory_left = lambda config, device: 2**26  # as on a GPU
        if job["own"]:
            impl.native_backend = lambda *args: None
        if job["flash"]:
            impl.flash_kernels = lambda *args: plain_flash
            flash.LEAST_TOKENS = 40  # some steps with prompts have fewer
            flash.FlashSchedules.for_model = _planned
        if job["scales"] is not None:
            _set_scales(*job["scales"])
        if options.get("kv_cache_dtype") == "fp8":
            _count_copies()
    if any(part["do"] == "score" for part in job["parts"]):
        from chai_attention.integrations.vllm.scoring import SETTINGS

        os.environ.update(SETTINGS)
    # vLLM's beam search asks the tokenizer how texts end
    needs_tokenizer = any(part["do"] == "beams" for part in job["parts"])
    return LLM(
        job["model"], skip_tokenizer_init=not needs_tokenizer, dtype="float32",
        disable_log_stats=False, **options,
    )  # fmt: skip


def _planned(config: Any, rows: int, softcap: bool) -> Any:
    from chai_attention.integrations.vllm.flash import FlashSchedules

    model = config.model_config
    size = model.get_head_size()
    return FlashSchedules(config, Planner(), rows, model.dtype, size, softcap)


def _set_scales(key: float, value: float) -> None:
    """Let layers have these scales, where without any in the checkpoint they would have 1."""
    from vllm.model_executor.layers.attention import attention

    default = attention.set_default_quant_scales

    def scaled(layer: Any, register_buffer: bool = False) -> None:
        default(layer, register_buffer)
        layer._k_scale_float, layer._v_scale_float = key, value

    attention.set_default_quant_scales = scaled


_copied: list[bool] = []  # how often 8-bit pages were to be copied, and whether there was room


def _count_copies() -> None:
    """Let shorter chunks attend to new tokens as they come, and to copies of pages."""
    from chai_attention.integrations.vllm import attend
    from chai_attention.integrations.vllm.copies import DequantisationWorkspace

    widen = DequantisationWorkspace.widen
    attend.LEAST_VARLEN = attend.LEAST_QUERIES = 24  # some are shorter

    def counted(*args: Any) -> Any:
        copies = widen(*args)
        _copied.append(copies is not None)
        return copies

    DequantisationWorkspace.widen = counted


def _do(job: dict[str, Any]) -> dict[str, Any]:
    llm = _engine(job)
    one_process = job["options"].get("tensor_parallel_size", 1) == 1 and (
        job["options"].get("pipeline_parallel_size", 1) == 1
    )
    free = [_free(llm)] if one_process else []
    done = [_DOES[part["do"]](llm, part) for part in job["parts"]]
    if one_process:
        free.append(_free(llm))
    config = llm.llm_engine.vllm_config.cache_config
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    # of this process; what only has pages runs nothing
    impls = [module.impl for module in context.values() if hasattr(module, "impl")]
    counted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    return {
        "parts": done,
        "free": free,
        "blocks": config.num_gpu_blocks,
        "block_size": config.block_size,
        "preemptions": sum(counted),
        "copied": [_copied.count(True), _copied.count(False)],
        "counted": any(impl.model_state._planned for impl in impls if hasattr(impl, "model_state")),
        "flash": sum(impl._flash is not None for impl in impls if hasattr(impl, "_flash")),
        "held": any(getattr(impl, "_held", None) is not None for impl in impls),
    }


def _free(llm: Any) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    count: int = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return count


def _prompts(part: Part) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in part["prompts"]]


def _params(tokens: int, n: int = 1, scored: bool = False) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        # vLLM refuses several greedy samples, and drafts with a top_k
        **({"temperature": 0} if n == 1 else {"temperature": 1, "top_k": 1}),
        max_tokens=tokens, ignore_eos=True, detokenize=False, n=n,
        prompt_logprobs=0 if scored else None,
    )  # fmt: skip


def _generate(llm: Any, part: Part) -> dict[str, Any]:
    params = _params(part["tokens"], part["n"], part["scored"])
    done = llm.generate(_prompts(part), params, use_tqdm=False)
    return {
        "ids": [[list(out.token_ids) for out in request.outputs] for request in done],
        "cached": [request.num_cached_tokens for request in done],
    }


def _score(llm: Any, part: Part) -> dict[str, Any]:
    from chai_attention.integrations.vllm.scoring import answer, batches

    requests = part["prompts"]
    found: dict[str, Any] = {"score": {}, "write": {}}
    lengths = [len(tokens) for tokens, _ in requests]
    for chosen in batches(lengths, part["rows"], part["budget"]):
        scored = answer(llm, {"score": [requests[n] for n in chosen]})["score"]
        contexts = [(requests[n][0][: -requests[n][1]], requests[n][1]) for n in chosen]
        written = answer(llm, {"write": contexts})["write"]
        found["score"] |= dict(zip(map(str, chosen), scored, strict=True))
        found["write"] |= dict(zip(map(str, chosen), written, strict=True))
    return found


def _beams(llm: Any, part: Part) -> dict[str, Any]:
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(
        beam_width=part["width"], max_tokens=part["tokens"], ignore_eos=True, temperature=0.0
    )
    done = llm.beam_search(_prompts(part), params)
    lengths = [len(ids) for ids in part["prompts"]]
    return {
        "ids": [
            [list(beam.tokens)[length:] for beam in request.sequences]
            for request, length in zip(done, lengths, strict=True)
        ]
    }


def _abort(llm: Any, part: Part) -> dict[str, Any]:
    def drop(step: int, names: list[str]) -> None:
        gone = [names[int(row)] for row, at in part["at"].items() if at == step]
        llm.llm_engine.abort_request(gone)

    return _stepwise(llm, part, drop)


def _reload(llm: Any, part: Part) -> dict[str, Any]:
    def again(step: int, names: list[str]) -> None:
        if step == part["at"]:
            llm.collective_rpc("reload_weights")

    return _stepwise(llm, part, again)


def _stepwise(llm: Any, part: Part, before: Callable[[int, list[str]], None]) -> dict[str, Any]:
    """Generate; ``before`` gets the number of each step ahead of it, and the requests' names."""
    engine = llm.llm_engine
    names = [f"{part['do']}-{row}" for row in range(len(part["prompts"]))]
    for name, prompt in zip(names, _prompts(part), strict=True):
        engine.add_request(name, prompt, _params(part["tokens"]))
    ids: dict[str, list[int]] = {}
    step = 0
    while engine.has_unfinished_requests():
        before(step, names)
        for request in engine.step():
            if request.finished:
                ids[request.request_id] = list(request.outputs[0].token_ids)
        step += 1
    return {"ids": [[ids[name]] if name in ids else None for name in names]}


def _crowd(llm: Any, part: Part) -> dict[str, Any]:
    import torch

    engine = llm.llm_engine
    for layer in engine.vllm_config.compilation_config.static_forward_context.values():
        layer.kv_cache.copy_(torch.randn(layer.kv_cache.shape) * 100)
    prompts, requests = _prompts(part), part["requests"]
    ids: dict[str, list[int]] = {}
    cached, step, waiting = 0, 0, sorted(range(len(requests)), key=lambda n: requests[n][2])
    while waiting or engine.has_unfinished_requests():
        while waiting and requests[waiting[0]][2] <= step:
            name = waiting.pop(0)
            prompt, tokens = requests[name][:2]
            engine.add_request(str(name), prompts[prompt], _params(tokens))
        engine.abort_request([str(n) for n, request in enumerate(requests) if request[3] == step])
        for request in engine.step():
            if request.finished:
                ids[request.request_id] = list(request.outputs[0].token_ids)
                cached += request.num_cached_tokens
        step += 1
    return {"ids": [ids.get(str(name)) for name in range(len(requests))], "cached": cached}


_DOES = {
    "crowd": _crowd,
    "generate": _generate,
    "score": _score,
    "beams": _beams,
    "abort": _abort,
    "reload": _reload,
}
