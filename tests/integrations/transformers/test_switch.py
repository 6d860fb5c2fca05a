"""Only the decoder of one model is switched: not what stands beside it, nor another model."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from transformers import AttentionInterface

from chai_attention import ClusteredCache
from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import (
    StaticClusteredCache,
    disable,
    enable,
    enabled,
)
from chai_attention.integrations.transformers.intervene import capture
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from tiny_models import COMMON, CONFIGS, GROUPED, SLIDING, tiny_model

VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
IMAGE = 90
IDS = torch.randint(3, 80, (1, 14), generator=torch.Generator().manual_seed(0))
WHOLE = ClusterProfile((6, 6, 6))


def llava():
    config = tf.LlavaConfig(
        text_config={"model_type": "llama", **COMMON, **GROUPED},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
        image_token_index=IMAGE, image_seq_length=4,
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(1, 3, 8, 8)}


def gemma3():
    text = {**COMMON, **GROUPED, "head_dim": 16, "sliding_window": 8, "layer_types": SLIDING}
    config = tf.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    return tf.Gemma3ForConditionalGeneration(config), {"pixel_values": torch.randn(1, 3, 8, 8)}


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = tf.Qwen2VLConfig(
        text_config={**COMMON, **GROUPED, "rope_parameters": rope},
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=IMAGE, vision_start_token_id=91, vision_end_token_id=92,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return tf.Qwen2VLForConditionalGeneration(config), inputs


MULTIMODAL = {"llava": llava, "gemma3": gemma3, "qwen2_vl": qwen2_vl}


def multimodal(name, image):
    """A model, and a prompt with an image or without."""
    torch.manual_seed(1)
    model, inputs = MULTIMODAL[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    if not image:
        return model.eval(), {"input_ids": IDS}
    ids = IDS.clone()
    ids[0, 3:7] = IMAGE
    kinds = (ids == IMAGE).long()
    inputs |= {"gemma3": {"token_type_ids": kinds}, "qwen2_vl": {"mm_token_type_ids": kinds}}.get(
        name, {}
    )
    return model.eval(), {"input_ids": ids, **inputs}


@torch.no_grad()
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_vision_tower_of_a_multimodal_model_runs_as_it_always_does(name, image):
    model, inputs = multimodal(name, image)
    run = {**inputs, "max_new_tokens": 4, "do_sample": False}
    want, tokens = model(**inputs).logits, model.generate(**run)
    before = [getattr(module, "config", None) for module in model.modules()]
    with enabled(model, WHOLE):
        names = {
            kind: {
                module.config._attn_implementation
                for name, module in model.named_modules()
                if hasattr(module, "config") and ("visi" in name or "visual" in name) == kind
            }
            for kind in (True, False)
        }
        assert names[True] == {"sdpa"}
        assert "chai" in names[False]
        if name == "gemma3" and image:  # its image tokens look both ways
            with pytest.raises(UnsupportedModelError, match="bidirectional"):
                model(**inputs)
        else:
            torch.testing.assert_close(model(**inputs).logits, want)
            assert torch.equal(model.generate(**run), tokens)
    assert all(
        getattr(module, "config", None) is config
        for module, config in zip(model.modules(), before, strict=True)
    )
    assert torch.equal(model(**inputs).logits, want)


@torch.no_grad()
def test_a_multimodal_model_is_clustered_like_its_language_model():
    model, inputs = multimodal("llava", image=False)
    profile = ClusterProfile((2, 3, 6), window=4)
    assert describe(model) == describe(model.config) == describe(model.model.language_model)
    with enabled(model.model.language_model, profile):
        want = model(**inputs).logits
    with enabled(model, profile):
        assert torch.equal(model(**inputs).logits, want)
        for cache in (
            ClusteredCache(model, profile),
            ClusteredCache(model.config, profile),
            StaticClusteredCache(model, profile, max_tokens=20),
        ):
            torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, want)
        inside = model.model.language_model(inputs["input_ids"], use_cache=True)
        assert isinstance(inside.past_key_values, ClusteredCache)


def test_capturing_a_multimodal_model_sees_its_language_model_alone():
    model, inputs = multimodal("llava", image=True)
    layers = []
    with capture(model, lambda call, out: layers.append(call.layer)):
        model(**inputs)
    assert layers == [0, 1, 2]


@torch.no_grad()
def test_two_models_on_one_config_object():
    config = CONFIGS["llama"]()
    config.initializer_range = 0.2
    one, two = (tf.LlamaForCausalLM(config).eval() for _ in "ab")
    plain = one(IDS).logits, two(IDS).logits
    profile = ClusterProfile((2, 3, 6), window=4)
    enable(one, profile)
    assert two.config._attn_implementation == config._attn_implementation == "sdpa"
    assert torch.equal(two(IDS).logits, plain[1])
    first = one(IDS).logits
    assert not torch.equal(first, plain[0])
    enable(two, ClusterProfile((1, 1, 1), window=2))
    assert torch.equal(one(IDS).logits, first)
    disable(one)
    assert torch.equal(one(IDS).logits, plain[0])
    assert not torch.equal(two(IDS).logits, plain[1])
    disable(two)
    assert torch.equal(two(IDS).logits, plain[1])
    assert one.config is two.config is config


def test_settings_of_an_enabled_models_config_are_the_models():
    model = tiny_model("llama")
    config = model.config
    with enabled(model, WHOLE):
        model.config.use_cache = False
        config.pad_token_id = 7
        assert model.config.pad_token_id == 7
        assert isinstance(model.config, tf.LlamaConfig)
        assert model.config.to_dict() == config.to_dict()
        assert model(IDS).past_key_values is None
        again = tf.AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
        assert type(again) is type(model)
        assert pickle.loads(pickle.dumps(model.config)).hidden_size == 48
    assert model.config is config
    assert config.use_cache is False


def test_another_attention_for_an_enabled_model_is_refused():
    model = tiny_model("llama")
    before = "chai" in AttentionInterface()  # while some other test's model is still enabled
    with (
        enabled(model, WHOLE),
        pytest.raises(UnsupportedModelError, match="switched to 'eager' while"),
    ):
        model.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    with enabled(model, WHOLE):
        model(IDS)
    assert model.config._attn_implementation == "eager"
    assert ("chai" in AttentionInterface()) == before


def test_generate_may_make_a_config_of_the_same_kind() -> None:
    # transformers 5.19 compares generation settings with those of `config.__class__()`
    model = tiny_model("llama")
    with enabled(model, WHOLE):
        other = type(model.config)()
        assert other._attn_implementation is None
        other._attn_implementation = "eager"
        assert other._attn_implementation == "eager"
        assert model.config._attn_implementation == "chai"
        assert "attn_implementation" not in other.to_diff_dict()


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_a_copy_of_an_enabled_models_config_makes_a_plain_model(name):
    model = tiny_model("llama") if name == "llama" else llava()[0].eval()
    plain = copy.deepcopy(model)
    enable(model, WHOLE)
    for config in (copy.deepcopy(model.config), plain.config):
        torch.manual_seed(0)
        other = type(model)(config).eval()
        assert other.config._attn_implementation == plain.config._attn_implementation
        assert not isinstance(other(IDS).past_key_values, ClusteredCache)
    disable(model)


def test_what_is_written_to_a_shallow_copy_of_the_config_stays_there():
    """transformers makes one for each layer where layers differ, and writes to it."""
    model = tiny_model("llama")
    with enabled(model, WHOLE):
        copied = copy.copy(model.config)
        copied.num_hidden_layers = 1
        assert copied._attn_implementation == "sdpa"
        assert type(copied) is tf.LlamaConfig
        assert model.config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 3


def test_a_model_on_the_very_config_of_an_enabled_one_is_refused():
    model = tiny_model("llama")
    enable(model, WHOLE)
    with pytest.raises(UnsupportedModelError, match=r"copy\.deepcopy\(model\.config\)"):
        type(model)(model.config).eval()(IDS)


@torch.no_grad()
@pytest.mark.parametrize("how", ["forward", "whole"])
def test_a_compiled_model_runs_with_clustered_heads(how):
    model = tiny_model("llama")
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    profile = ClusterProfile((2, 6, 3), window=5, recent=4, sinks=1)
    plain = model.generate(IDS, **greedy)
    with enabled(model, profile):
        want = model.generate(IDS, **greedy)
    assert not torch.equal(want, plain)
    torch._dynamo.reset()
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.compile(backend="eager")
    assert torch.equal(model.generate(IDS, **greedy), plain)
    with enabled(model, profile):
        assert torch.equal(model.generate(IDS, **greedy), want)
    assert torch.equal(model.generate(IDS, **greedy), plain)
    torch._dynamo.reset()
