"""The modules of a model that attend, and which ones are refused."""

import pytest
import torch
import transformers as tf
from torch import nn

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers.modules import attention_modules
from chai_attention.runtime.shape import describe
from chai_attention.runtime.skeleton import empty_model
from tiny_models import COMMON, CONFIGS, GROUPED, SIZES, tiny_model


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_modules_found_are_those_that_attend(family):
    """Each module found really brings its layer's queries and keys to the interface."""
    model = tiny_model(family)
    shape = describe(model)
    seen = {}

    def attend(module, query, key, value, mask, **kwargs):
        assert query.shape[1::2] == (shape.heads, shape.head_dim)
        assert key.shape[1::2] == (shape.kv_heads, shape.head_dim)
        seen[len(seen)] = module
        return query.transpose(1, 2).contiguous(), None

    tf.AttentionInterface.register("looking", attend)
    try:
        model.set_attn_implementation("looking")
        model(torch.ones(1, 4, dtype=torch.long))
    finally:
        del tf.AttentionInterface._global_mapping["looking"]
    assert seen == attention_modules(model)
    assert all(isinstance(module, nn.Module) for module in seen.values())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tf.BertConfig(**SIZES, num_attention_heads=6), "looks both ways"),
        (tf.GptOssConfig(**COMMON, **GROUPED, head_dim=16), "learned attention sinks"),
    ],
)
def test_attention_that_would_be_computed_wrongly_is_refused(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        attention_modules(empty_model(config, torch.float32))


def test_attention_that_never_asks_the_interface_is_refused():
    """A model may bring the interface's name along and yet compute attention by itself."""
    model = tiny_model("llama")

    class OwnAttention(type(model.model.layers[1].self_attn)):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    model.model.layers[1].self_attn.__class__ = OwnAttention
    with pytest.raises(UnsupportedModelError, match="attention interface"):
        attention_modules(model)


def test_a_layer_without_attention_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="one attention module per layer"):
        attention_modules(model)
