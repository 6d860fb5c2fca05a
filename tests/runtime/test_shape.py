"""The shape read from models and configs, and which models are refused."""

import pytest
import torch
import transformers as tf

from chai_attention.errors import UnsupportedModelError
from chai_attention.runtime.shape import FAMILIES, ModelShape, describe
from chai_attention.runtime.skeleton import empty_model
from tiny_models import ATTENTION, COMMON, CONFIGS, GROUPED, SIZES, tiny_model

WIDE = {"qwen3", "gemma", "gemma-one", "gemma2", "gemma3"}
KV_HEADS = {"gemma-one": 1} | dict.fromkeys(
    ("llama-grouped", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "cohere-norms",
     "granite", "starcoder2"), 2,
)  # fmt: skip


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_is_described_from_model_and_config(family):
    model = tiny_model(family)
    slides = family in ("gemma2", "gemma3", "olmo3")
    want = ModelShape(
        architecture=model.config.model_type,
        layers=3,
        heads=6,
        kv_heads=KV_HEADS.get(family, 6),
        head_dim=16 if family in WIDE else 8,
        clusterable=(not slides, True, True),
        hidden_size=48,
        sliding_window=8 if slides else None,
    )
    assert describe(model) == describe(model.config) == want
    assert want.architecture in FAMILIES


def test_composite_configs_are_read_through_their_text_part():
    text = CONFIGS["gemma3"]()
    composite = tf.Gemma3Config(text_config=text.to_dict())
    assert describe(composite) == describe(text)


@pytest.mark.parametrize(
    ("config", "clusterable"),
    [
        (tf.MistralConfig(**COMMON, **GROUPED, sliding_window=8), (False,) * 3),
        (tf.MistralConfig(**COMMON, **GROUPED, sliding_window=None), (True,) * 3),
        (tf.Qwen2Config(**COMMON, **GROUPED, use_sliding_window=False), (True,) * 3),
        (tf.Qwen2Config(**COMMON, **GROUPED, use_sliding_window=True, sliding_window=8,
                        max_window_layers=2), (True, True, False)),
        (tf.Phi3Config(**COMMON, **GROUPED, sliding_window=8), (False,) * 3),
        (tf.Starcoder2Config(**COMMON, **GROUPED, sliding_window=8), (False,) * 3),
        (tf.Olmo3Config(**{**COMMON, "num_hidden_layers": 4}, **ATTENTION),
         (False, False, False, True)),
    ],
)  # fmt: skip
def test_sliding_window_layers_are_left_alone(config, clusterable):
    assert describe(config).clusterable == clusterable


REFUSED = {
    "bloom": (tf.BloomConfig(hidden_size=48, n_layer=2, n_head=6), "attention interface"),
    "falcon": (tf.FalconConfig(**SIZES, num_attention_heads=6), "attention interface"),
    "gptj": (tf.GPTJConfig(n_embd=48, n_layer=2, n_head=6, rotary_dim=4), "attention interface"),
    "mpt": (tf.MptConfig(d_model=48, n_layers=2, n_heads=6), "attention interface"),
    "mamba": (tf.MambaConfig(**SIZES), "attention interface"),
    "t5": (tf.T5Config(), "causal language model"),
    "bart": (tf.BartConfig(), "encoder and a decoder"),
    "deepseek_v3": (tf.DeepseekV3Config(**COMMON), "latent attention"),
    "jamba": (tf.JambaConfig(**COMMON, **GROUPED), "linear_attention"),
    "qwen3_next": (tf.Qwen3NextConfig(**COMMON, **GROUPED), "linear_attention"),
    "llama4_text": (tf.Llama4TextConfig(**COMMON, **GROUPED), "chunked_attention"),
}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_unsupported_families_are_refused_by_config(family):
    config, reason = REFUSED[family]
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        describe(config)
    assert "supported: decoder-only models such as llama, mistral" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "mpt"])
def test_unsupported_families_are_refused_by_model(family):
    with pytest.raises(UnsupportedModelError, match="attention interface"):
        describe(empty_model(REFUSED[family][0], torch.float32))
