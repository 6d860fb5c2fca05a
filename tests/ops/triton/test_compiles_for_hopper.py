"""Kernels compile for Hopper GPUs, whose instructions no interpreter knows, where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "compile_for_hopper.py"
DECODE = {"_merge", "local_parts", "parts"}
WANTED = {
    "default": DECODE | {"prefill_window", "prefill_paged_window", "_prefill_window"},
    "k=8 window": DECODE | {"prefill_window", "prefill_paged_window", "_prefill_window"},
    "grouped streaming": DECODE | {"prefill_window", "prefill_paged_window", "_prefill_window"},
    "k=8": {"_merge", "parts", "prefill_hopper", "_prefill"},
    "fp8 default": {"_merge", "_parts", "_prefill_window"},
    "fp8 k=8": {"_merge", "_parts", "_prefill"},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", WANTED)
def test_kernels_compile_without_a_gpu(kind: str, tmp_path: Path) -> None:
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, SCRIPT, kind], env=settings, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = set(result.stdout.split())
    assert WANTED[kind] | {"_write"} <= compiled, compiled
