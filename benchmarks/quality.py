"""Perplexity against K,V bytes saved, for several calibrations of one model: JSON and a table.

All settings are calibrated on the same windows of one text and scored on the same windows of
another; the rise is paired window by window against the model without clusters.

    python benchmarks/quality.py MODEL --calibration FILE --test FILE --out quality.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chai_attention.calibration import calibrate, load_texts, windows_of
from chai_attention.cli.loading import load_model
from chai_attention.evaluation import paired_rise, token_loss
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.support import describe

LENGTH = 256
ONLINE_BOUNDS = {"scores": (0.05, 0.1, 0.2), "k-bytes": (0.3, 0.33)}
STATIC_BOUND = {"scores": 0.1, "k-bytes": 0.3}


def settings(target: str) -> list[dict[str, Any]]:
    """What is tried."""
    online = [{"max_error": bound, "membership": "online"} for bound in ONLINE_BOUNDS[target]]
    static = {"max_error": STATIC_BOUND[target], "membership": "static"}
    return [{"recipe": "paper"}, *online, static]


def main() -> None:
    """Calibrate and score every setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--samples", type=int, default=24, help="calibration windows")
    parser.add_argument("--windows", type=int, default=16, help="test windows")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    shape = describe(model)
    target = "k-bytes" if 1 < shape.kv_heads < shape.heads else "scores"
    text = load_texts(options.calibration, tokens=10**6)
    calibration = windows_of(text, tokenizer, options.samples, LENGTH, seed=0)
    test = windows_of(
        load_texts(options.test, tokens=10**6), tokenizer, options.windows, LENGTH, seed=0
    )
    baseline = token_loss(model, test)
    rows = []
    for setting in settings(target):
        profile = calibrate(model, tokenizer, calibration, length=LENGTH, **setting)
        with enabled(model, profile):
            rise = paired_rise(baseline, token_loss(model, test))
        full, kept = profile.bytes_per_token(shape, 2)
        removed = sum(shape.heads - k for k in profile.clusters) / (shape.heads * shape.layers)
        rows.append(
            {
                **setting,
                "target": profile.target,
                "removed": removed,
                "saved": 1 - kept / full,
                "rise": rise.rise,
                "standard_error": rise.standard_error,
            }
        )
    name = Path(options.model).name
    table = Table(title=f"{name}: perplexity {baseline.perplexity:.2f} without clusters")
    for column in ("setting", "target", "heads removed", "K,V bytes saved", "perplexity rise"):
        table.add_column(column)
    for row in rows:
        setting = row.get("recipe") or f"{row['membership']}, max_error {row['max_error']}"
        table.add_row(
            setting,
            row["target"],
            f"{row['removed']:.1%}",
            f"{row['saved']:.1%}",
            f"{row['rise']:+.1%} ±{row['standard_error']:.1%}",
        )
    Console(width=110).print(table)
    if options.out:
        about = {
            "model": name,
            "calibration": f"{len(calibration)} windows, {Path(options.calibration).name}",
            "test": f"{len(test)} windows, {Path(options.test).name}",
            "length": LENGTH,
            "perplexity": baseline.perplexity,
        }
        options.out.write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
