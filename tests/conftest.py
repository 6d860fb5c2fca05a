"""Shared by all tests: seeds, the folder of real models and text, random memberships."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # kernels run in Triton's interpreter; it has to be asked before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from chai_attention.ops import choice

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """What attends on the CPU is what is faster on most, whatever the clock says here."""
    monkeypatch.setattr(choice, "measured", choice.usual)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and text, beside the checkout."""
    if not (SHARED / "models" / "mha-lm" / "model.safetensors").exists():
        pytest.skip("needs the shared folder with models and text beside the checkout")
    return SHARED
