"""Refit weights in a model: in force while enabled, gone without a trace afterwards."""

from dataclasses import replace

import pytest
import torch

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.transformers import disable, enable, enabled
from chai_attention.integrations.transformers.corrections import Corrections
from chai_attention.integrations.transformers.modules import (
    attention_modules,
    is_transposed,
    output_projection,
    output_weight,
)
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
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
        ("layers_0_weight", torch.zeros(48, 47), r"is \[48, 47\], not \[48, 48\]"),
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
    fitting = with_corrections(model, layers_0_weight=before * 2)
    enable(model, fitting)
    with pytest.raises(ProfileError), enabled(model, with_corrections(model, **{name: tensor})):
        pass
    assert model.config._attn_implementation == "chai", "the profile in force must stay in force"
    assert torch.equal(output_weight(attention_modules(model)[0]), before * 2)
    disable(model)
    with pytest.raises(ProfileError, match="does not fit the model"):
        with_corrections(model, **{name: tensor}).check(describe(model.config))


def test_a_refit_without_its_tensors_is_refused():
    with pytest.raises(ProfileError, match="load it from its file"):
        enable(tiny_model("llama"), ClusterProfile((6, 6, 6), refit={"kind": "output"}))


def test_a_model_cast_meanwhile_is_one_dtype_again():
    model, cast = tiny_model("opt"), tiny_model("opt").to(torch.bfloat16)
    weight = output_weight(attention_modules(model)[0]) * 2
    enable(model, with_corrections(model, layers_0_weight=weight, layers_1_bias=torch.ones(48)))
    model.to(torch.bfloat16)
    disable(model)
    for got, want in zip(model.parameters(), cast.parameters(), strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)


def test_a_failure_in_the_middle_leaves_the_weights_as_they_were(monkeypatch):
    model = tiny_model("llama")
    before = {name: id(p) for name, p in model.named_parameters()}
    weight = output_weight(attention_modules(model)[0])
    replace_one, calls = Corrections._replace, []

    def full(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        replace_one(self, *args)

    monkeypatch.setattr(Corrections, "_replace", full)
    with pytest.raises(torch.OutOfMemoryError):
        enable(model, with_corrections(model, layers_0_weight=weight, layers_1_weight=weight))
    assert {name: id(p) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused(dtype):
    module = attention_modules(tiny_model("llama"))[0]
    module.o_proj.weight = torch.nn.Parameter(module.o_proj.weight.to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        output_projection(module)


def test_other_projections_are_refused():
    with pytest.raises(UnsupportedModelError, match="cannot find the output projection"):
        output_projection(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        module = attention_modules(tiny_model("llama"))[0]
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        output_projection(module)
