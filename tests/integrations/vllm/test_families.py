"""Families of models in vLLM, each with its own code there, against the Transformers runtime."""

import random

import pytest
import torch
import transformers as tf

from chai_attention.profile import ClusterProfile
from runtime_tokens import runtime_tokens
from vllm_job import generate

PAGE, TOKENS = 32, 24
SIZES = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256,
    "max_position_embeddings": 512, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "opt": lambda: tf.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=256),
    # norms behind the layers and embeddings of another size, as in OPT-350M
    "opt-350m": lambda: tf.OPTConfig(
        **SIZES, ffn_dim=128, word_embed_proj_dim=128, do_layer_norm_before=False
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES, intermediate_size=128),
    "gpt_neox-serial": lambda: tf.GPTNeoXConfig(
        **SIZES, intermediate_size=128, use_parallel_residual=False
    ),
}
STATIC = ClusterProfile(
    (2, 4, 3), "static", representatives=((0, 1, 0, 1), (0, 1, 2, 3), (0, 1, 2, 0))
)
WINDOW = ClusterProfile(
    STATIC.clusters, "static", representatives=STATIC.representatives, recent=9, sinks=3
)
STREAMING = ClusterProfile(
    (2, 3, 1), "static", representatives=((0, 0, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)),
    streaming=((3,), (1,), (0, 2, 3)), recent=9, sinks=3,
)  # fmt: skip
PROFILES = {
    "static": STATIC, "window": WINDOW, "streaming": STREAMING,
    "online": ClusterProfile(STATIC.clusters, window=8),
}  # fmt: skip
CASES = [(family, "static") for family in FAMILIES]
CASES += [(family, kind) for family in ("opt", "gpt_neox") for kind in PROFILES if kind != "static"]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Write a random model of a family."""

    def made(family):
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp(family)
        model = tf.AutoModelForCausalLM.from_config(FAMILIES[family]())
        for name, parameter in model.named_parameters():  # what families begin with as zeros
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(folder)
        return folder

    return made


@pytest.fixture(scope="module")
def prompts():
    chosen = random.Random(6)
    return [[chosen.randrange(3, 256) for _ in range(size)] for size in (90, 9, 33, 64, 120)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_tokens_are_those_of_the_transformers_runtime(family, kind, engine, model_of, prompts):
    model = model_of(family)
    # prompts come in chunks, of which an online membership's first one holds its probe window
    found = engine(
        model, [generate(prompts, TOKENS)], PROFILES[kind], block_size=PAGE,
        max_num_batched_tokens=512 if kind == "online" else 48,
    )  # fmt: skip
    wanted = runtime_tokens(model, PROFILES[kind], prompts, TOKENS)
    assert found["parts"][0]["ids"] == wanted
    plain = runtime_tokens(model, ClusterProfile((4,) * 3), prompts, TOKENS)
    assert wanted != plain  # the clusters decide tokens


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_two_ranks_have_the_tokens_of_one(family, engine, model_of, prompts):
    """Each rank keeps as many heads, so that no cluster is taken apart."""
    model = model_of(family)
    profile = ClusterProfile(
        (2, 4, 2), "static", representatives=((1, 1, 2, 2), (0, 1, 2, 3), (0, 0, 3, 3))
    )
    parts = [generate(prompts, TOKENS)]
    found = engine(model, parts, profile, block_size=PAGE, tensor_parallel_size=2)
    assert found["parts"][0]["ids"] == runtime_tokens(model, profile, prompts, TOKENS)
