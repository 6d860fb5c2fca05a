"""The process in which vLLM scores tokens for `engine_process`: JSON in, JSON out, line by line.

First comes what the engine is started with (``{"llm": arguments of vllm.LLM}``), to which the
answer is ``{"ready": true}``, then messages (`answer`). What goes wrong is answered with
``{"error": text}``, and ends the process. So does the end of its input.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

Request = tuple[Sequence[int], int]  # tokens, and how many of the last ones are meant


def main() -> None:
    """Start an engine, and answer until nobody asks any more."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is its log
    try:
        llm = engine(json.loads(sys.stdin.readline()))
        _send(channel, {"ready": True})
        for line in sys.stdin:
            _send(channel, answer(llm, json.loads(line)))
    except Exception as error:
        traceback.print_exc()  # into the log first: who reads the answer ends this process
        _send(channel, {"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


def _send(channel: Any, message: Mapping[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def engine(asked: Mapping[str, Any]) -> Any:
    """Start vLLM in this process."""
    from vllm import LLM

    from chai_attention.integrations.vllm.plugin import register

    register()  # vLLM finds it by itself only where the package is installed
    return LLM(**asked["llm"])


def answer(llm: Any, message: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a message.

    - ``{"score": [[tokens, n], ...]}``: for each, ``[log-likelihoods of the last n tokens, nats,
      whether each is the likeliest one]``.
    - ``{"write": [[tokens, n], ...]}``: for each, ``[the n tokens that greedy decoding writes
      behind them, their log-likelihoods]``.
    """
    if "score" in message:
        return {"score": _score(llm, message["score"])}
    return {"write": _write(llm, message["write"])}


def _score(llm: Any, requests: Sequence[Request]) -> list[Any]:
    """Score what is there: the model reads all tokens but the last, as it does in transformers.

    So the last one has to be "written": it is the only one allowed, and its log-likelihood is that
    among all tokens (vLLM's ``raw_logprobs``).
    """
    prompts, params = [], []
    for tokens, count in requests:
        prompts.append({"prompt_token_ids": list(tokens[:-1])})
        inside = 0 if count > 1 else None  # of the prompt's own tokens, no others beside them
        params.append(_greedy(1, prompt_logprobs=inside, allowed_token_ids=[tokens[-1]]))
    found = []
    for (tokens, count), done in zip(requests, _run(llm, prompts, params), strict=True):
        behind = done.prompt_logprobs[1 - count :] if count > 1 else []
        steps = [*behind, *done.outputs[0].logprobs]
        each = [step[token] for token, step in zip(tokens[-count:], steps, strict=True)]
        found.append([[one.logprob for one in each], [one.rank == 1 for one in each]])
    return found


def _write(llm: Any, requests: Sequence[Request]) -> list[Any]:
    prompts = [{"prompt_token_ids": list(tokens)} for tokens, _ in requests]
    params = [_greedy(count) for _, count in requests]
    found = []
    for done in _run(llm, prompts, params):
        tokens, steps = list(done.outputs[0].token_ids), done.outputs[0].logprobs
        each = [step[token].logprob for token, step in zip(tokens, steps, strict=True)]
        found.append([tokens, each])
    return found


def _greedy(count: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0, **more
    )


def _run(llm: Any, prompts: Sequence[Any], params: Sequence[Any]) -> Any:
    return llm.generate(list(prompts), list(params), use_tqdm=False)


if __name__ == "__main__":
    main()
