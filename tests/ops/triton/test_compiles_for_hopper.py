"""Kernels compile for GPUs where there is none: the interpreter takes more than the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "compile_for_hopper.py"
DECODE = {"_merge", "local_parts", "parts"}
WANTED = {
    "default": DECODE | {"prefill_window", "prefill_paged_window", "_prefill_window", "_join"},
    "k=8 window": DECODE | {"prefill_window", "prefill_paged_window", "_prefill_window"},
    "grouped streaming": DECODE | {"prefill_window", "prefill_paged_window", "_prefill_window"},
    "k=8": {"_merge", "parts", "prefill_hopper", "_prefill", "_join"},
    "fp8 default": {"_merge", "_parts", "_prefill_window"},
    "fp8 k=8": {"_merge", "_parts", "_prefill"},
}


EVERY = DECODE - {"parts", "local_parts"} | {
    "_parts", "_local", "_local_only", "_prefill", "_prefill_window", "_maps", "_distances",
    "_kmeans", "_kmedoids", "_join",
}  # fmt: skip


def compiled(what: str, folder: Path) -> set[str]:
    """Names of the kernels that the script compiled."""
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, SCRIPT, what], env=settings, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return set(result.stdout.split())


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", WANTED)
def test_kernels_compile_without_a_gpu(kind: str, tmp_path: Path) -> None:
    names = compiled(kind, tmp_path)
    assert WANTED[kind] | {"_write"} <= names, names


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", ["8.9", "9.0"])
def test_k_and_v_of_other_sizes_compile_without_a_gpu(capability: str, tmp_path: Path) -> None:
    """The compiler refuses branches that name tensors of different shapes alike.

    And a launch more shared memory than there is: 99 KiB on many GPUs (8.6, 8.9, 12.0).
    """
    names = compiled(capability, tmp_path)
    assert EVERY | {"_write"} <= names, names
