"""``vllm bench serve`` at saturation: servers of LLaMA-7B's shape with and without clustered heads.

Random weights, bfloat16, the kinds and settings of `serving.py`, and its loads: requests with the
lengths of chats, and long prompts, all sent at once over HTTP. A prompt is a row of words, each of
which is one token. Servers run one after the other, those with clusters by ``chai serve``.

    python benchmarks/serving_http.py --out docs/results/serving/http --only stock --only default
    python benchmarks/serving_http.py --out docs/results/serving/http --table
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from parts import Parts, load_parts
from serving import engine_options
from serving_jobs import compile_caches, kind_jobs, label
from serving_kinds import KINDS, stock_of
from serving_loads import FULL, LOADS, requests_of, scale_of
from serving_soak import running

WORDS = 32000
# vLLM refuses texts of more letters than its longest context of the longest token, and does not
# count the spaces between words
UNKNOWN = "unknown" * 4
SHOWN = {  # of what the benchmark saves
    "output_throughput": "output tokens/s",
    "total_token_throughput": "all tokens/s",
    "median_ttft_ms": "median TTFT, ms",
    "median_tpot_ms": "median TPOT, ms",
}
MORE_IS_BETTER = ("output_throughput", "total_token_throughput")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer in which every word is a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = {UNKNOWN: 0, **{f"w{n}": n for n in range(1, WORDS)}}
    words = Tokenizer(WordLevel(names, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN).save_pretrained(folder)


def write_load(name: str, file: Path) -> int:
    """Write a load's requests as the benchmark reads them; how many they are."""
    chosen, rows = random.Random(3), []
    for length, count in requests_of(name, FULL):
        prompt = " ".join(f"w{n}" for n in chosen.choices(range(3, WORDS), k=length))
        rows.append(json.dumps({"prompt": prompt, "output_tokens": count}))
    file.write_text("\n".join(rows) + "\n")
    return len(rows)


def serve_command(job: dict[str, Any]) -> list[str]:
    """The command that serves a job's model."""
    options = []
    for key, value in job["options"].items():
        name = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            options.append(name if value else name.replace("--", "--no-", 1))
        else:
            options += [name, value if isinstance(value, str) else json.dumps(value)]
    if job["profile"] is None:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", job["model"], *options]
    chai = [sys.executable, "-c", "from chai_attention.cli import main; main()", "serve"]
    return [*chai, job["model"], "--profile", job["profile"], *options]


def bench(url: str, model: str, load: Path, count: int, log: Path) -> dict[str, Any]:
    """Run ``vllm bench serve``; what it saves."""
    result = log.with_suffix(".json")
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve",
        "--base-url", url, "--endpoint", "/v1/completions", "--backend", "openai",
        "--model", model, "--dataset-name", "custom", "--dataset-path", load,
        "--custom-output-len", "-1", "--skip-chat-template", "--disable-shuffle",
        "--num-prompts", count, "--num-warmups", "16", "--ignore-eos",
        "--temperature", "0", "--disable-tqdm",
        "--save-result", "--result-dir", result.parent, "--result-filename", result.name,
    ]  # fmt: skip
    with log.open("w") as file:
        subprocess.run(list(map(str, command)), stdout=file, stderr=file, check=True)
    found: dict[str, Any] = json.loads(result.read_text())
    if found["completed"] != count:
        raise RuntimeError(f"{found['completed']} of {count} requests were answered: see {log}")
    return found


def run_job(job: dict[str, Any], work: Path, out: Path, parts: list[str]) -> None:
    """Serve a model and send it all loads."""
    start = time.perf_counter()
    name = label(job["name"])
    with running(serve_command(job), work / f"serve-{name}.log", compile_caches(work)) as server:
        results = Parts(out / f"http-{name}.json", {"options": job["options"]})
        results.found |= {"kind": job["name"], "start_s": round(time.perf_counter() - start, 1)}
        for load in [load for load in parts if load not in results.found.get("loads", {})]:
            file = work / f"{label(load)}.jsonl"
            count = write_load(load, file)
            log = work / f"bench-{name}-{label(load)}.log"
            measured = bench(server.url, job["model"], file, count, log)
            results.add(load, {key: round(measured[key], 2) for key in SHOWN}, "loads")
            print(f"{name}, {load}: {json.dumps(results.found['loads'][load])}", flush=True)


def table(folder: Path) -> None:
    """Print all results in a folder, with what they gain on the stock server's."""
    found = {}
    for path in sorted(folder.glob("http-*.json")):
        result = load_parts(path)
        found[result.get("kind", path.stem.removeprefix("http-"))] = result["loads"]
    for name, results in found.items():
        for load, values in results.items():
            parts = []
            for key, text in SHOWN.items():
                stock = stock_of(name)
                base = found.get(stock, {}).get(load, {}).get(key)
                gain = ""
                if base and name != stock:
                    ratio = values[key] / base if key in MORE_IS_BETTER else base / values[key]
                    gain = f" ({ratio:.3f}x)"
                parts.append(f"{text} {values[key]:,.0f}{gain}")
            print(f"{name}, {load}: {', '.join(parts)}")


def main() -> None:
    """Run the servers that are asked for, or print results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/serving"), help="models and logs")
    parser.add_argument("--out", type=Path, default=Path("serving-http"), help="folder of results")
    one_card = [name for name, kind in KINDS.items() if LOADS[0] in scale_of(kind.model).loads]
    parser.add_argument("--only", action="append", choices=one_card, help="repeatable")
    parser.add_argument("--part", action="append", choices=[*LOADS], help="default: all")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    if options.table:
        table(options.out)
        return
    made = kind_jobs(options.only or ["stock", "default"], engine_options(FULL), options.work)
    for job in made:
        write_tokenizer(Path(job["model"]))
        run_job(job, options.work, options.out, options.part or [*LOADS])


if __name__ == "__main__":
    main()
