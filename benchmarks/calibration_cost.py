"""Time and peak memory of collecting a recipe's evidence on one model: JSON and a table.

Every recipe runs in a process of its own, whose peak memory is that of the model and the recipe.

    python benchmarks/calibration_cost.py MODEL --text calibration.txt --samples 32
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from chai_attention.calibration import load_texts, windows_of
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.settings import Settings
from chai_attention.errors import ChaiError
from chai_attention.integrations.transformers.loading import load_model
from chai_attention.results import write_result
from chai_attention.runtime.shape import describe

RECIPES = {
    "load only": None,
    "scores (also online, paper)": Settings(recipe="elbow"),
    "value": Settings(cost="value", recent=0, removed=0.1),
    "gradient": Settings(recent=0, removed=0.1),
    "gradient, recent window": Settings(removed=0.1),
}
LENGTH = 256


def measure(name: str, model: str, text: str, samples: int) -> dict[str, float]:
    """Seconds of the evidence and peak resident memory of this process, GB."""
    loaded, tokenizer = load_model(model, "float32", "cpu")
    windows = windows_of(load_texts(text, tokens=10**6), tokenizer, samples, LENGTH, seed=0)
    settings = RECIPES[name]
    start = time.perf_counter()
    if settings is not None:
        EvidenceStore(loaded, windows).get(settings.resolve(describe(loaded)))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": round(seconds, 1), "peak_gb": round(peak, 2)}


def main() -> None:
    """Measure every recipe in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--only", choices=RECIPES, help="one recipe, in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.model, options.text, options.samples)))
        return
    rows = {}
    for name in RECIPES:
        done = subprocess.run(
            [
                *(sys.executable, __file__, options.model, "--text", options.text),
                *("--samples", str(options.samples), "--only", name),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {rows[name]}", flush=True)
    about = {
        "model": Path(options.model).name,
        "samples": options.samples,
        "length": LENGTH,
        "cores": os.cpu_count(),
        "dtype": "float32",
    }
    if options.out:
        write_result(options.out, {"about": about, "results": rows}, ChaiError)


if __name__ == "__main__":
    main()
