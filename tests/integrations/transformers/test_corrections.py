"""Refit weights in a model: in force while enabled, gone without a trace afterwards."""

from dataclasses import replace

import pytest
import torch

from chai_attention.errors import ProfileError
from chai_attention.integrations.transformers import disable, enable, enabled
from chai_attention.integrations.transformers.support import (
    attention_modules,
    is_transposed,
    output_projection,
    output_weight,
)
from chai_attention.profile import ClusterProfile
from tiny_models import CONFIGS, tiny_model


def with_corrections(model, **tensors):
    names = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
    return ClusterProfile((6, 6, 6), refit={"kind": "output"}, corrections=names)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_they_are_edited_weights(family):
    model, edited = tiny_model(family), tiny_model(family)
    modules, ids = attention_modules(model), torch.randint(3, 97, (2, 9))
    plain = model(ids).logits
    weight = torch.randn_like(output_weight(modules[2])) / 4
    bias = torch.randn(weight.shape[0])
    projection = output_projection(attention_modules(edited)[2])
    projection.weight.copy_(weight.T if is_transposed(projection) else weight)
    if projection.bias is None:
        projection.bias = torch.nn.Parameter(bias)
    else:
        projection.bias += bias
    profile = with_corrections(model, layers_2_weight=weight, layers_2_bias=bias)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    with enabled(edited, replace(profile, refit=None, corrections=None)):
        want = edited(ids).logits
    with enabled(model, profile):
        torch.testing.assert_close(model(ids).logits, want)
    assert torch.equal(model(ids).logits, plain)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_another_profile_takes_their_place():
    model = tiny_model("llama")
    weight = output_weight(attention_modules(model)[0])
    before = weight.clone()
    enable(model, with_corrections(model, layers_0_weight=before * 2))
    enable(model, with_corrections(model, layers_0_weight=before * 3))
    assert torch.equal(output_weight(attention_modules(model)[0]), before * 3)
    disable(model)
    assert output_weight(attention_modules(model)[0]).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers_9_weight", torch.zeros(48, 48), "layers.9.weight, which this model does not have"),
        ("layers_0_scale", torch.zeros(48), "does not have"),
        ("layers_0_weight", torch.zeros(48, 47), r"is \[48, 47\], this model needs \[48, 48\]"),
        ("layers_0_bias", torch.zeros(4), "made for another"),
    ],
)
def test_a_refit_of_another_model_is_refused(name, tensor, message):
    model = tiny_model("llama")
    before = output_weight(attention_modules(model)[0]).clone()
    with pytest.raises(ProfileError, match=message):
        enable(model, with_corrections(model, **{name: tensor}))
    assert torch.equal(output_weight(attention_modules(model)[0]), before)
    assert model.config._attn_implementation != "chai"


def test_a_refit_without_its_tensors_is_refused():
    with pytest.raises(ProfileError, match="load it from its file"):
        enable(tiny_model("llama"), ClusterProfile((6, 6, 6), refit={"kind": "output"}))
