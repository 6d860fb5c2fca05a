"""Time and memory of gradient costs for a large model's shape, with random weights: JSON.

python benchmarks/gradient_cost.py --shape llama-7b --samples 128 --length 1024
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chai_attention.calibration.costs import ExactWindow, OffsetStatistics, collect_costs
from chai_attention.calibration.statistics import observe
from chai_attention.errors import ChaiError
from chai_attention.results import write_result

SHAPES = {
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 1000,
    },
}


def offsets_of(
    model: Any, windows: torch.Tensor, window: ExactWindow, batch_size: int
) -> torch.Tensor:
    """Offsets of an exact recent window, one forward pass."""
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    statistics = OffsetStatistics(layers, heads, [window])
    observe(model, windows, [statistics.add], batch_size=batch_size)
    return statistics.offsets[0]


def main() -> None:
    """Build the model on its device, collect costs, print seconds and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--recent", type=int, default=32)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=options.length)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(default)
    windows = torch.randint(config.vocab_size, (options.samples, options.length))
    window = ExactWindow(options.recent, options.sinks)
    rows = []
    size = options.batch_size

    def offsets() -> torch.Tensor:
        return offsets_of(model, windows, window, size)

    def gradient() -> torch.Tensor:
        (found,) = collect_costs(model, windows, "gradient", exact=[window], batch_size=size)
        return found.sharing

    for name, work in (("offsets", offsets), ("gradient", gradient)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - start  # the results are on the host: all work is done
        assert torch.isfinite(found).all(), f"{name} are not finite"
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        rows.append({"what": name, "seconds": round(seconds, 2), "peak_gb": peak})
        print(rows[-1], flush=True)
    about = {
        "shape": options.shape,
        "samples": options.samples,
        "length": options.length,
        "batch_size": options.batch_size,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": "bfloat16",
    }
    if options.out:
        write_result(options.out, {"about": about, "results": rows}, ChaiError)


if __name__ == "__main__":
    main()
