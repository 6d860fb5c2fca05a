"""Small result files of every command, for tests of the report."""

import json
from dataclasses import asdict

import torch

from chai_attention.evaluation.points import Point
from chai_attention.evaluation.redundancy import study
from chai_attention.evaluation.redundancy_files import RedundancyError, parse_redundancy
from chai_attention.results import read_result
from tiny_models import tiny_model

MACHINE = {"device": "cuda", "gpu": "Some GPU", "torch": "2.99.0", "processor": "p", "cores": 2}
CEILINGS = {"bfloat16": {"read_gb_s": 3000.0, "matmul_tflop_s": 0.8}}
CASE = {"kind": "decode", "batch": 16, "tokens": 8192, "dtype": "bfloat16"}


def redundancy(path):
    windows = torch.randint(3, 97, (3, 20), generator=torch.manual_seed(0))
    prompts = [
        ("request 1", windows[:1], [f"token {i} " for i in range(20)]),
        ("</script><b>short", windows[1:2, :7], list("abcdefg")),
    ]
    found = study(
        tiny_model("llama"), windows, name="tiny-redundant",
        text={"sources": ["some.txt:1"], "seed": 0},
        prompts=prompts, lengths=[3, 8], clusters=2, cells=12,
    )  # fmt: skip
    return found.save(path)


def frontier(path, recipe="gradient"):
    points = [
        Point(
            name, {}, "save", 0.1, "t.txt", "abc", context, 16, 0.2, saved, name == "paper", 28.7,
            rise, 0.011, 3.0,
        )
        for name, rise in (("paper", 0.5), (recipe, 0.0123))
        for context in (256, 1024)
        for saved in (0.05, 0.1)
    ]  # fmt: skip
    return _write(
        path,
        {
            "schema_version": 1,
            "about": {"model": "tiny-frontier", "seed": 7, "target": None},
            "points": [asdict(point) for point in points],
        },
    )


def attention(path, drift=1.0):
    times = {"us": 400.0, "iqr_us": 8.0, "repeats": 20}
    rows = [
        {
            **CASE, **times, "clusters": k, "kept_keys": k, "bytes": 1.2e9, "flops": 1e9,
            "ideal_us": 390.0, "of_ideal": 0.975, "baseline": "SDPA cuDNN", "baseline_us": 700.0,
            "speedup": 1.75, "ideal_speedup": 1.78, "error": 0.0, "allowed_error": 0.1,
        }
        for k in (4, 32)
    ]  # fmt: skip
    base = {**CASE, **times, "us": 700.0, "baseline": "SDPA cuDNN", "fused": True}
    shape = {"name": "tiny-attention", "heads": 32, "kv_heads": 32, "head_dim": 128}
    return _write(
        path,
        {
            "schema_version": 1, "benchmark": "attention", "machine": MACHINE, "shape": shape,
            "ceilings": CEILINGS, "drift": {"bfloat16": drift}, "layout": "dense",
            "results": rows, "baselines": [base],
        },
    )  # fmt: skip


def whole_model(path):
    def row(run, factor):
        found = {"batch": 1, "tokens": 2048, "run": run, "peak_bytes": None}
        found |= {"kv_bytes": int(1e9 * factor), "full_kv_bytes": 10**9}
        for name in ("ttft", "tpot"):
            found |= {f"{name}_us": 2e4 * factor, f"ideal_{name}_us": 1e4}
            for base in ("unfused", "fused"):
                found |= {f"{name}_vs_{base}": None, f"ideal_{name}_vs_{base}": None}
        return found

    lost = {"batch": 1, "tokens": 2048, "run": "unfused", "missing": "out of memory"}
    model = {"name": "tiny-model", "layers": 2, "heads": 32, "kv_heads": 32, "head_dim": 128}
    return _write(
        path,
        {
            "schema_version": 1, "benchmark": "model", "machine": MACHINE, "model": model,
            "ceilings": CEILINGS, "drift": {"bfloat16": 1.0}, "dtype": "bfloat16", "profile": "p",
            "clusters": [32, 4], "steps": "steps",
            "results": [lost, row("fused", 1), row("CHAI", 0.8)],
        },
    )  # fmt: skip


def evaluation(path):
    def measures(value, diff, nll):
        return {
            "acc": value, "acc_se": 0.01, "acc_diff": diff, "acc_diff_se": 0.005,
            "acc_norm": None, "acc_norm_se": None, "acc_norm_diff": None, "acc_norm_diff_se": None,
            "nll": nll, "nll_se": 0.1, "nll_diff": nll - 2, "nll_diff_se": 0.02,
        }  # fmt: skip

    def row(name, value, diff, nll, kept):
        shares = {"kv_length": 66, "kv_share": kept, "kv_long_length": 2048, "kv_long_share": kept}
        cell = {"kind": "choice", "items": 80, "perplexity": None, **shares}
        return {
            "comparator": name, "source": f"source of {name}", "settings": {},
            "tasks": {"piqa": {**cell, **measures(value, diff, nll)}},
            "average": measures(value, diff, nll), **shares,
        }  # fmt: skip

    run = {
        "model": "tiny-tasks", "weights": "w" * 64, "dtype": "float32", "device": "cpu",
        "batch_size": 4, "seed": 0, "versions": {"torch": "2.99.0"},
    }  # fmt: skip
    return _write(
        path,
        {
            "schema_version": 1, "run": run, "tasks": ["piqa"], "average_of": ["piqa"],
            "rows": [row("mha", 0.6, 0.0, 2.0, 1.0), row("chai", 0.58, -0.02, 2.3, 0.9)],
        },
    )  # fmt: skip


EVERY = {
    "redundancy.json": redundancy,
    "frontier.json": frontier,
    "attention.json": attention,
    "model.json": whole_model,
    "results.json": evaluation,
}


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def load_redundancy(path):
    """The study in a file of ``chai redundancy``, as ``chai report`` reads it."""
    return parse_redundancy(read_result(path, RedundancyError, "make it again"), path)
