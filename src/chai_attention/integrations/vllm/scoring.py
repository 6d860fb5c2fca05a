"""vLLM in a process of its own, which scores tokens.

All of vLLM is in that process, so that its memory is free when it ends, also after an error.
What it prints goes into a file. `ScoringEngine` starts it, and `main` runs in it. They exchange
JSON, line by line: first the arguments of vLLM (``{"llm": arguments of vllm.LLM}``), which the
process answers with ``{"ready": true}``, then messages (`answer`). It answers an error with
``{"error": text}`` and ends. It also ends at the end of its input.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chai_attention.errors import EvaluationError

Request = tuple[Sequence[int], int]  # tokens, and how many of the last ones are meant

BUDGET = 2048  # tokens of a step: logits of all of them exist at a time, in float32
TIED = 8  # likeliest tokens that are looked at: 16-bit logits are often equal
_SECONDS = 60  # that an engine gets to end by itself
_MODULE = "chai_attention.integrations.vllm.scoring"
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors come to us, and steps are those we ask for
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # the one token behind the longest input is not read
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # compiled at the start, for nothing
}
# what vLLM says where the reason was told before
_VAGUE = re.compile(r"root cause|stack trace|initialization failed|EngineDead|Engine core")
_ERROR = re.compile(r"(?:^|\s)((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception)): (\S.*)")


class ScoringEngine:
    """An engine that has been started; a context that ends it.

    Args:
        arguments: of ``vllm.LLM``; JSON values.
        rows: requests of a step at most.
        what: it is started for, in error messages.

    Raises:
        EvaluationError: it does not start; one line with vLLM's reason and its log.
    """

    def __init__(self, arguments: Mapping[str, Any], rows: int, what: str):
        self._what, self._rows = what, rows
        self._budget = int(arguments["max_num_batched_tokens"])
        with tempfile.NamedTemporaryFile(prefix="chai-vllm-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **SETTINGS},
                start_new_session=True,  # no Ctrl-C reaches it: who started it ends it
            )  # fmt: skip
        self._failed = False
        try:
            self._ask({"llm": dict(arguments)}, "start")
        except BaseException:
            self.kill()
            self._drop_log()
            raise

    def score(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[tuple[float, bool]]:
        """Score the last tokens of rows, each given all tokens before it.

        Args:
            requests: rows of tokens, and how many of the last ones are scored; at least one other
                stands before them.
            progress: called with the number of rows done.

        Returns:
            For each row the log-likelihood of those tokens, nats, and whether each of them is the
            likeliest one.

        Raises:
            EvaluationError: the engine failed.
        """
        found = self._each("score", requests, progress)
        return [(math.fsum(values), all(likeliest)) for values, likeliest in found]

    def write(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[tuple[list[int], float]]:
        """Write tokens behind prompts by greedy decoding.

        Args:
            requests: prompts, and how many tokens to write.
            progress: called with the number of prompts done.

        Returns:
            The tokens of each, and their log-likelihood in nats.

        Raises:
            EvaluationError: the engine failed.
        """
        found = self._each("write", requests, progress)
        return [(tokens, math.fsum(values)) for tokens, values in found]

    def close(self) -> None:
        """End the process and all that it started; its log goes too, unless an error named it."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS)
        self.kill()
        self._drop_log()

    def kill(self) -> None:
        """End them at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # ranks are in its group
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> ScoringEngine:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            self.kill()  # an interrupt does not wait for what is being scored
        self.close()

    def _drop_log(self) -> None:
        if not self._failed:
            self.log.unlink(missing_ok=True)

    def _each(
        self, name: str, requests: Sequence[Request], progress: Callable[[int], None]
    ) -> list[Any]:
        found: list[Any] = [None] * len(requests)
        done = 0
        for chosen in batches([len(tokens) for tokens, _ in requests], self._rows, self._budget):
            message = {name: [[list(requests[n][0]), requests[n][1]] for n in chosen]}
            for number, value in zip(chosen, self._ask(message, name)[name], strict=True):
                found[number] = value
            done += len(chosen)
            progress(done)
        return found

    def _ask(self, message: Mapping[str, Any], doing: str) -> dict[str, Any]:
        """Send a message and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if line and "error" not in answer:
            return answer
        if not line:
            self._process.wait()
        self.kill()
        self._failed = True
        code = self._process.returncode
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        said = answer.get("error") or f"its process ended ({ended})"
        reason = reason_of(said, self.log.read_text(errors="replace"))
        raise EvaluationError(
            f"vLLM failed to {doing} ({self._what}): {reason}{_advice(reason)}; its log: {self.log}"
        )


def batches(lengths: Sequence[int], rows: int, budget: int) -> Iterator[list[int]]:
    """Deal requests to steps, the longest first: numbers of those that go together.

    A step takes them whole, so that an online membership is decided on the whole of its window.
    One that is longer than a step's tokens goes alone, in chunks.

    Args:
        lengths: tokens of each request.
        rows: requests of a step at most.
        budget: tokens of a step.
    """
    chosen: list[int] = []
    used = 0
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if chosen and (len(chosen) == rows or used + lengths[number] > budget):
            yield chosen
            chosen, used = [], 0
        chosen.append(number)
        used += lengths[number]
    if chosen:
        yield chosen


def reason_of(said: str, log: str) -> str:
    """Tell in one line why an engine failed: what was said of it, or its log where that is vague.

    Args:
        said: an error and its text.
        log: what vLLM printed.
    """
    reason = _line(said)
    if not _VAGUE.search(reason) and not reason.startswith("its process ended"):
        return reason
    told = (f"{kind.rpartition('.')[2]}: {text}" for kind, text in _ERROR.findall(log))
    clear = [each for each in told if not _VAGUE.search(each)]
    return clear[0][:400] if clear else reason


def _line(text: str) -> str:
    """The line of an error that says something: pydantic puts it below a title."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    inner = [line for line in lines if line.startswith("Value error, ")]
    chosen = inner[0].removeprefix("Value error, ") if inner else (lines or ["no reason given"])[0]
    return chosen.partition(" [type=")[0][:400]


def _advice(reason: str) -> str:
    """What to do where memory is short."""
    if not re.search(r"memory|KV cache|ended \(signal 9", reason):
        return ""
    return " (more GPUs: --tensor-parallel; fewer rows: --batch-size; or shorter texts)"


def main() -> None:
    """Start an engine, and answer messages until its input ends."""
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
        inside = TIED if count > 1 else None
        params.append(_greedy(1, TIED, prompt_logprobs=inside, allowed_token_ids=[tokens[-1]]))
    found = []
    for (tokens, count), done in zip(requests, _run(llm, prompts, params), strict=True):
        behind = done.prompt_logprobs[1 - count :] if count > 1 else []
        steps = [*behind, *done.outputs[0].logprobs]
        each = list(zip(tokens[-count:], steps, strict=True))
        found.append(
            [
                [step[token].logprob for token, step in each],
                [token == _likeliest(step) for token, step in each],
            ]
        )
    return found


def _likeliest(step: Mapping[int, Any]) -> int:
    """The token that greedy decoding takes: of equally likely ones that with the lowest number.

    vLLM's ranks count equals, so that none of these is the first.
    """
    most = max(one.logprob for one in step.values())
    return min(token for token, one in step.items() if one.logprob == most)


def _write(llm: Any, requests: Sequence[Request]) -> list[Any]:
    prompts = [{"prompt_token_ids": list(tokens)} for tokens, _ in requests]
    params = [_greedy(count) for _, count in requests]
    found = []
    for done in _run(llm, prompts, params):
        tokens, steps = list(done.outputs[0].token_ids), done.outputs[0].logprobs
        each = [step[token].logprob for token, step in zip(tokens, steps, strict=True)]
        found.append([tokens, each])
    return found


def _greedy(count: int, beside: int = 0, **more: Any) -> Any:
    """Parameters for so many tokens, with log-likelihoods of the likeliest ones beside them."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=beside, **more
    )


def _run(llm: Any, prompts: Sequence[Any], params: Sequence[Any]) -> Any:
    return llm.generate(list(prompts), list(params), use_tqdm=False)


if __name__ == "__main__":
    main()
