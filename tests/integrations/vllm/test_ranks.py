"""One, two and four tensor-parallel ranks write the same tokens."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chai_attention.profile import ClusterProfile
from runtime_tokens import runtime_tokens
from vllm_job import generate
from vllm_profiles import PAGE, prompts_of

HEADS, LAYERS, TOKENS = 8, 4, 12
EVERY = tuple(range(HEADS))
LOCAL = {"recent": 40, "sinks": 4}
# each rank of four has two heads: the layers share, keep all, stream by half and stream wholly
REPRESENTATIVES = ((1, 1, 2, 2, 5, 5, 6, 6), EVERY, EVERY, EVERY)
PROFILES = {
    "static": ClusterProfile(
        (4, 8, 4, 8), "static", tensor_parallel=4,
        representatives=(*REPRESENTATIVES[:2], (0, 0, 3, 3, 4, 4, 7, 7), EVERY),
    ),
    "online": ClusterProfile((4, 8, 4, 8), window=8),
    "window": ClusterProfile(
        (4, 8, 4, 8), "static", tensor_parallel=4,
        representatives=(*REPRESENTATIVES[:2], (0, 0, 3, 3, 4, 4, 7, 7), EVERY), **LOCAL,
    ),
    "streaming": ClusterProfile(
        (4, 8, 4, 0), "static", tensor_parallel=4, representatives=REPRESENTATIVES,
        streaming=((), (), (0, 3, 5, 6), EVERY), **LOCAL,
    ),
    "online streaming": ClusterProfile(
        (4, 8, 4, 0), window=8, streaming=((), (), (0, 3, 5, 6), EVERY), **LOCAL
    ),
}  # fmt: skip


def model_of(kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=LAYERS, head_dim=64,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, vocab_size=256,
        initializer_range=0.15, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> Path:
    """A model whose heads are alike in pairs, so that an online membership finds those pairs."""
    model = model_of(HEADS)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = projection.weight.data.view(HEADS // 2, 2, 64, -1)
            heads[:, 1] = heads[:, 0] + 0.02 * torch.randn_like(heads[:, 0])
    folder = tmp_path_factory.mktemp("paired")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [*((kind, ranks) for kind in PROFILES for ranks in (2, 4))],
)
def test_ranks_have_the_tokens_of_one(kind, ranks, engine, paired) -> None:
    prompts = prompts_of([90, 9, 64])
    found = engine(
        paired, [generate(prompts, TOKENS)], PROFILES[kind], block_size=PAGE,
        tensor_parallel_size=ranks,
    )  # fmt: skip
    wanted = runtime_tokens(paired, PROFILES[kind], prompts, TOKENS)
    assert found["parts"][0]["ids"] == wanted
    plain = runtime_tokens(paired, ClusterProfile((HEADS,) * LAYERS), prompts, TOKENS)
    assert wanted != plain  # the clusters decide tokens


def test_ranks_that_hold_the_same_kv_head_have_the_tokens_of_one(engine, tmp_path) -> None:
    model_of(2).save_pretrained(tmp_path)
    profile = ClusterProfile(
        (4, 8, 0, 0), "static", tensor_parallel=4, streaming=((), (), EVERY, EVERY), **LOCAL,
        representatives=REPRESENTATIVES,
    )  # fmt: skip
    prompts = prompts_of([90, 9, 64])
    found = engine(
        tmp_path, [generate(prompts, TOKENS)], profile, block_size=PAGE, tensor_parallel_size=4
    )
    assert found["parts"][0]["ids"] == runtime_tokens(tmp_path, profile, prompts, TOKENS)
