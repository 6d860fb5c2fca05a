"""A server under fire: a real OpenAI client against ``chai serve``, on a CPU.

Every request is sent twice: one by one, then all mixed, many at once, together with clients that
leave in the middle of an answer and bodies that are wrong. Then a crowd: one body with as many
prompts as run at once, which fit in the small K,V cache, while their answers do not, so that some
are preempted however slow the client is. Answers must be the same as alone, wrong bodies get 4xx
and a message, and in the end no page of the cache is in use. Greedy and in float32; where rounding,
which depends on the batch, tips two tokens that are almost equally likely, the difference of their
log-probabilities is reported.

    python benchmarks/serving_soak.py --out soak.json            # SmolLM2, 300 requests, 32 at once
    python benchmarks/serving_soak.py --membership streaming --out streaming.json
    python benchmarks/serving_soak.py --stock --out stock.json   # vLLM without clusters, to compare
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chai_attention.errors import ChaiError
from chai_attention.results import write_result

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "LICENSE"  # of the prompts: a text that does not change
PAGE = 32  # tokens
EVERY = 8  # requests between wrong bodies
LOCAL = 1e-3  # nats between two tokens that rounding may tip
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
# what a client may send by mistake, and what the message has to name
WRONG: list[tuple[str, str]] = [
    ('{"model": "MODEL", "prompt": "a", "max_tokens": 4', "json"),
    ('{"model": "MODEL"}', "prompt"),
    ('{"model": "MODEL", "prompt": "a", "max_tokens": -3}', "max_tokens"),
    ('{"model": "MODEL", "prompt": "a", "temperature": "warm"}', "temperature"),
    ('{"model": "MODEL", "prompt": "a", "n": 0}', "n"),
    ('{"model": "MODEL", "prompt": [1, 2, 999999999]}', "token"),
    ('{"model": "MODEL", "prompt": "LONG"}', "length"),
    ('{"model": "nobody", "prompt": "a"}', "nobody"),
    ("[]", "object"),
    ("", "body"),
]


@dataclass(frozen=True)
class Request:
    """What a client asks for; ``leaves`` after so many tokens if it does not wait for the end."""

    prompt: str | list[int]
    tokens: int
    stream: bool = False
    leaves: int | None = None

    def body(self, model: str) -> dict[str, Any]:
        """Arguments of a completion."""
        return {
            "model": model, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0,
            "logprobs": 2, "extra_body": {"ignore_eos": True},
        }  # fmt: skip


def requests_of(count: int, text: str, longest: int, seed: int) -> list[Request]:
    """Requests of mixed lengths up to ``longest`` letters, some streamed; one in six leaves.

    Every third begins as the others of them do, for half of that length.
    """
    chosen = random.Random(seed)
    made = []
    for number in range(count):
        size = max(3, longest // chosen.choice([400, 60, 12, 3, 1]))
        start = chosen.randrange(len(text) - size)
        common = text[: longest // 2] if number % 3 == 0 else ""
        size = size // 2 + 1 if common else size
        leaves = chosen.choice([None] * 5 + [chosen.randint(0, 5)])
        stream = leaves is not None or chosen.random() < 0.5
        made.append(
            Request(common + text[start : start + size], chosen.randint(6, 40), stream, leaves)
        )
    return made


def crowd_of(count: int, pages: int, tokens: list[int]) -> list[Request]:
    """Requests of equal lengths whose answers do not fit in ``pages`` together."""
    each = max(1, pages // count)
    starts = random.Random(7).sample(range(len(tokens) - each * PAGE), count)
    return [Request(tokens[start : start + each * PAGE - 4], 2 * PAGE) for start in starts]


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], log: Path, settings: dict[str, str] | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                stdout=file, stderr=file, env={**QUIET, **os.environ, **(settings or {})},
            )  # fmt: skip

    def wait(self, seconds: float) -> None:
        """Wait until it answers."""
        end = time.time() + seconds
        while time.time() < end:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def metrics(self) -> dict[str, float]:
        """Sums of what ``/metrics`` counts."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = defaultdict(float)
        for line in lines:
            known = re.match(r"vllm:(\w+)(?:\{.*\})? ([-\d.e+]+)$", line)
            if known:
                found[known[1]] += float(known[2])
        return dict(found)

    def in_use(self) -> dict[str, float]:
        """Share of pages in use, requests that run and that wait."""
        found = self.metrics()
        names = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
        return {name: found[name] for name in names}

    def client(self) -> Any:
        """An OpenAI client of this server."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)

    def tokens_of(self, model: str, text: str) -> list[int]:
        """``text`` as the server's tokenizer reads it."""
        body = json.dumps({"model": model, "prompt": text}).encode()
        sent = urllib.request.Request(
            f"{self.url}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(sent, timeout=60) as got:
            return list(json.load(got)["tokens"])

    def idle(self, seconds: float = 60) -> dict[str, float]:
        """Wait until nothing is in use; what still is."""
        end = time.time() + seconds
        while any((used := self.in_use()).values()) and time.time() < end:
            time.sleep(0.5)
        return used


@contextlib.contextmanager
def running(
    command: list[str], log: Path, settings: dict[str, str] | None = None
) -> Iterator[Server]:
    """Start a server, with ``settings`` in its environment, and stop it in the end."""
    server = Server(command, log, settings)
    try:
        server.wait(300)
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(30)
        except subprocess.TimeoutExpired:
            server.process.kill()


async def answer(client: Any, model: str, request: Request) -> dict[str, Any] | None:
    """One completion: its text and tokens with their two best log-probabilities; None if left."""
    options = request.body(model)
    parts: list[Any] = []
    if request.stream:
        async with await client.completions.create(**options, stream=True) as stream:
            if request.leaves == 0:
                return None
            async for chunk in stream:
                parts += chunk.choices
                if request.leaves is not None and len(parts) >= request.leaves:
                    return None
    else:
        parts = (await client.completions.create(**options)).choices
    return read(parts)


async def in_one_body(server: Server, model: str, requests: list[Request]) -> list[dict[str, Any]]:
    """The completions of requests that ask for equally many tokens, sent as one body."""
    options = requests[0].body(model) | {"prompt": [request.prompt for request in requests]}
    async with server.client() as client:
        choices = (await client.completions.create(**options)).choices
    return [read([choice]) for choice in sorted(choices, key=lambda choice: choice.index)]


def read(parts: list[Any]) -> dict[str, Any]:
    """One answer from its parts."""
    tops = [top for part in parts for top in part.logprobs.top_logprobs]
    gaps = [max(top.values()) - min(top.values()) for top in tops]
    tokens = [token for part in parts for token in part.logprobs.tokens]
    return {"text": "".join(part.text for part in parts), "tokens": tokens, "gaps": gaps}


def wrong_body(server: Server, model: str, number: int) -> str | None:
    """Send something wrong; what is wrong with the server's answer, if anything."""
    body, named = WRONG[number % len(WRONG)]
    body = body.replace("MODEL", model).replace("LONG", "many words " * 20000)
    sent = urllib.request.Request(
        f"{server.url}/v1/completions", body.encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(sent, timeout=120) as got:
            return f"{body[:60]!r} was taken: {got.status}"
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        if not 400 <= error.code < 500:
            return f"{body[:60]!r} gives {error.code}: {text[:200]}"
        message = json.loads(text).get("error", {}).get("message", "")
        if named not in message.lower():
            return f"{body[:60]!r} gives {error.code} without {named!r}: {text[:200]}"
        return None


async def mixed(
    server: Server, model: str, requests: list[Request], at_once: int
) -> tuple[list[dict[str, Any] | None], list[str]]:
    """All requests, ``at_once`` at a time, and a wrong body beside every eighth."""
    gate = asyncio.Semaphore(at_once)
    async with server.client() as client:

        async def one(number: int, request: Request) -> tuple[Any, str | None]:
            async with gate:
                problem = None
                if number % EVERY == 0:
                    problem = await asyncio.to_thread(wrong_body, server, model, number // EVERY)
                return await answer(client, model, request), problem

        done = await asyncio.gather(*(one(*each) for each in enumerate(requests)))
    return [each[0] for each in done], [each[1] for each in done if each[1]]


def compare(
    requests: list[Request], alone: list[Any], together: list[Any]
) -> tuple[int, list[dict[str, Any]]]:
    """Answers that are equal, and where the others differ first."""
    same, different = 0, []
    for number, (request, one, other) in enumerate(zip(requests, alone, together, strict=True)):
        if request.leaves is not None:
            continue
        if one == {**other, "gaps": one["gaps"]} and len(one["tokens"]) == request.tokens:
            same += 1
            continue
        pairs = list(zip(one["tokens"], other["tokens"], strict=False))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        gaps = [answer["gaps"][at] for answer in (one, other) if at < len(answer["gaps"])]
        different.append({"request": number, "token": at, "gaps": gaps})
    return same, different


def soak(
    server: Server, model: str, requests: list[Request], crowd: list[Request], at_once: int
) -> dict[str, Any]:
    """Run everything and report."""
    before = server.idle()
    staying = [Request(each.prompt, each.tokens, each.stream) for each in requests]
    alone, problems = asyncio.run(mixed(server, model, staying + crowd, 1))
    order = list(range(len(requests)))
    random.Random(5).shuffle(order)
    start = time.perf_counter()
    got, more = asyncio.run(mixed(server, model, [requests[i] for i in order], at_once))
    spent = time.perf_counter() - start
    together = [got[order.index(number)] for number in range(len(requests))]
    preempted = server.metrics()["num_preemptions_total"]
    crowded = asyncio.run(in_one_body(server, model, crowd))
    same, different = compare(requests + crowd, alone, together + crowded)
    counted = server.metrics()
    return {
        "requests": len(requests),
        "at_once": at_once,
        "left_early": sum(each.leaves is not None for each in requests),
        "seconds_at_once": round(spent, 1),
        "crowd": len(crowd),
        "equal": same,
        "different": different,
        "wrong_bodies": -(-len(staying + crowd) // EVERY) - (-len(requests) // EVERY),
        "problems": problems + more,
        "preemptions": preempted,
        "preemptions_in_crowd": counted["num_preemptions_total"] - preempted,
        "prefix_cache_hits": counted["prefix_cache_hits_total"],
        "in_use_before": before,
        "in_use_after": server.idle(),
    }


def smollm2(work: Path, membership: str) -> tuple[Path, Path]:
    """SmolLM2 as a checkpoint, and a profile for it that clusters every second layer."""
    from chai_attention.hub import SMOLLM2
    from chai_attention.integrations.transformers.loading import load_model
    from chai_attention.profile import ClusterProfile

    folder = work / "smollm2"
    if not (folder / "model.safetensors").exists():
        model, tokenizer = load_model(SMOLLM2, "float32", "cpu")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    file = work / f"{membership}.json"
    clusters = (9, 6) * 15
    every = tuple(range(9))
    if membership == "streaming":  # the middle of three K/V heads streams, the last one shares
        shared = (0, 1, 2, 3, 4, 5, 0, 1, 2)
        profile = ClusterProfile(
            (9, 3) * 15, "static", representatives=(every, shared) * 15,
            streaming=((), (3, 4, 5)) * 15, recent=64, sinks=4,
        )  # fmt: skip
    elif membership == "static":
        pairs = (every, (0, 0, 2, 3, 3, 5, 6, 6, 8))
        profile = ClusterProfile(clusters, "static", representatives=pairs * 15)
    else:
        profile = ClusterProfile(clusters, window=16)
    profile.save(file)
    return folder, file


def main() -> None:
    """Start a server, soak it, print the report; exit code 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/serving-soak"))
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; default: SmolLM2")
    parser.add_argument("--profile", help="for --model")
    parser.add_argument("--membership", choices=["online", "static", "streaming"], default="online",
                        help="of SmolLM2's profile")  # fmt: skip
    parser.add_argument("--stock", action="store_true", help="vLLM without clusters")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--pages", type=int, default=90, help="of the K,V cache")
    parser.add_argument("--longest", type=int, default=700, help="letters of a prompt")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.model is None:
        options.model, options.profile = smollm2(options.work, options.membership)
    model = str(options.model)
    command = [str(Path(sys.executable).with_name("chai")), "serve", model]
    command += ["--profile", str(options.profile)]
    if options.stock:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += [
        "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", str(options.at_once),
        "--block-size", str(PAGE), "--num-gpu-blocks-override", str(options.pages),
        "--max-num-batched-tokens", "2048", "--enforce-eager", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    text = TEXT.read_text()
    requests = requests_of(options.requests, text, options.longest, 11)
    with running(command, options.work / "server.log") as server:
        crowd = crowd_of(options.at_once, options.pages, server.tokens_of(model, text))
        report = soak(server, model, requests, crowd, options.at_once)
    report["server"] = "stock" if options.stock else "chai"
    print(json.dumps(report, indent=1))
    if options.out is not None:
        write_result(options.out, report, ChaiError)
    far = [each for each in report["different"] if min(each["gaps"], default=9.0) > LOCAL]
    sys.exit(1 if far or report["problems"] or any(report["in_use_after"].values()) else 0)


if __name__ == "__main__":
    main()
