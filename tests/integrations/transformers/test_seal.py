"""What is done to a model behind clustered heads' back works, or is refused before it is wrong."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AttentionInterface

from chai_attention import ClusteredCache
from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import disable, enable, enabled
from chai_attention.integrations.transformers.modules import attention_modules, output_weight
from chai_attention.profile import ClusterProfile
from lora import add_lora, remove_lora
from tiny_models import tiny_model

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
MAPS = ((0, 0, 0, 3, 3, 3), (0, 1, 2, 3, 4, 5), (2, 4, 2, 3, 4, 2))


def refit():
    weights = {f"layers.{layer}.weight": torch.randn(48, 48) / 7 for layer in range(3)}
    return ClusterProfile((2, 6, 3), window=4, refit={"kind": "output"}, corrections=weights)


def static():
    return ClusterProfile((2, 6, 3), "static", representatives=MAPS)


def both():
    profile = static()
    return ClusterProfile(
        profile.clusters, "static", representatives=MAPS, refit={"kind": "output"},
        corrections=refit().corrections,
    )  # fmt: skip


PROFILES = {"online": lambda: ClusterProfile((2, 6, 3), window=4), "static": static}
SEALED = {"refit": refit, "static and refit": both}
PROFILES.update(SEALED)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# ---- saving and loading


@pytest.mark.parametrize("name", SEALED)
def test_no_checkpoint_gets_weights_that_are_not_the_models(name, tmp_path):
    model = tiny_model("llama")
    enable(model, SEALED[name]())
    for save in (model.state_dict, model.model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(UnsupportedModelError, match=r"disable\(model\) before saving"):
            save()
    disable(model)
    want = tiny_model("llama").state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[key])


def test_a_profile_that_changes_no_weights_lets_them_be_saved_and_loaded(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    with enabled(model, PROFILES["online"]()):
        model.save_pretrained(tmp_path)
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.config._attn_implementation == "sdpa"
        assert torch.equal(logits(again), logits(tiny_model("llama")))
        model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", SEALED)
def test_weights_cannot_be_loaded_into_a_refit(name, assign):
    model = tiny_model("llama")
    weights = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    enable(model, SEALED[name]())
    want = logits(model)
    for part in (model, model.model, model.model.layers[0].self_attn):
        with pytest.raises(UnsupportedModelError, match=r"disable\(model\) before loading"):
            part.load_state_dict(weights, strict=False, assign=assign)
    assert torch.equal(logits(model), want), "nothing was loaded before it was refused"
    disable(model)
    model.load_state_dict(weights, assign=assign)
    assert not any(parameter.any() for parameter in model.parameters())


# ---- adapters and quantisation


@pytest.mark.parametrize("target", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_an_adapter_added_to_an_enabled_model_works(target):
    model, first = tiny_model("llama"), tiny_model("llama")
    add_lora(first, target)
    enable(model, PROFILES["online"]())
    torch.manual_seed(3)
    add_lora(model, target)
    for (name, mine), (_, theirs) in zip(
        first.named_parameters(), model.named_parameters(), strict=True
    ):
        mine.data = theirs.data.clone()
        assert "lora" not in name or mine.any()
    want_plain = logits(first)
    enable(first, PROFILES["online"]())
    assert torch.equal(logits(model), logits(first))
    disable(model)
    assert torch.equal(logits(model), want_plain)


def test_an_adapter_on_a_refit_projection_is_refused():
    model = tiny_model("llama")
    plain = logits(model)
    enable(model, refit())
    add_lora(model, "o_proj")
    with pytest.raises(UnsupportedModelError, match=r"o_proj is a .* but holds refit weights"):
        logits(model)
    disable(model)
    remove_lora(model)
    assert torch.equal(logits(model), plain)


class Quantised(torch.Tensor):
    """A weight of a kind of its own, as torchao's ``quantize_`` puts in place."""


def quantise(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = (module.weight.detach() * 8).round() / 8
            module.weight = nn.Parameter(weight.as_subclass(Quantised), requires_grad=False)


@pytest.mark.parametrize("name", SEALED)
def test_weights_quantised_in_place_are_refused_before_the_next_forward(name):
    model = tiny_model("llama")
    enable(model, SEALED[name]())
    quantise(model)
    with pytest.raises(UnsupportedModelError, match="other weights or hooks now, but holds"):
        logits(model)
    disable(model)
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight,
                       tiny_model("llama").model.layers[0].self_attn.o_proj.weight)  # fmt: skip


def test_quantising_an_enabled_model_with_its_own_weights_works():
    model, other = tiny_model("llama"), tiny_model("llama")
    quantise(other)
    want = logits(other)
    enable(model, PROFILES["online"]())
    quantise(model)
    enable(other, PROFILES["online"]())
    assert torch.equal(logits(model), logits(other))
    disable(model)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward", "module", "attention", "bias"])
def test_other_changes_of_sealed_modules_are_noticed(kind):
    model = tiny_model("llama")
    enable(model, both())
    layer = model.model.layers[2]
    projection = layer.self_attn.o_proj
    if kind == "hook":
        projection.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "pre-hook":
        projection.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif kind == "forward":
        projection.forward = lambda x: x
    elif kind == "module":
        layer.self_attn.o_proj = nn.Linear(48, 48)
    elif kind == "attention":
        layer.self_attn = type(layer.self_attn)(model.config, 2)
    else:
        projection.bias = nn.Parameter(torch.ones(48))
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.self_attn.* before changing"):
        logits(model)


def test_a_model_that_is_moved_and_cast_is_still_itself():
    model = tiny_model("llama")
    enable(model, both())
    model.to(torch.bfloat16).to("cpu").requires_grad_(False).train().eval()
    logits(model)
    disable(model)
    for got, want in zip(model.parameters(), tiny_model("llama").parameters(), strict=True):
        assert torch.equal(got, want.to(torch.bfloat16))


# ---- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", PROFILES)
def test_a_copy_of_an_enabled_model_is_an_enabled_model(name, how):
    model = tiny_model("llama")
    plain = logits(model)
    enable(model, PROFILES[name]())
    want, tokens = logits(model), model.generate(IDS, max_new_tokens=4, do_sample=False)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    disable(model)
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(twin), want), "the copy outlives what it was copied from"
    assert torch.equal(twin.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
    disable(twin)
    assert torch.equal(logits(twin), plain)
    assert twin.config._attn_implementation == "sdpa"
    for got, weight in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, weight)
    twin.state_dict()
    enable(twin, PROFILES[name]())
    logits(twin)


def test_the_seal_is_copied_too():
    model = tiny_model("llama")
    enable(model, both())
    twin = copy.deepcopy(model)
    with pytest.raises(UnsupportedModelError, match="before saving"):
        twin.state_dict()
    add_lora(twin, "o_proj")
    with pytest.raises(UnsupportedModelError, match="before changing"):
        logits(twin)
    logits(model)


def test_a_part_of_an_enabled_model_is_not_enabled_again():
    model = tiny_model("llama")
    with (
        enabled(model, PROFILES["online"]()),
        pytest.raises(UnsupportedModelError, match="for a part of this model, or for a model"),
    ):
        enable(model.model, PROFILES["online"]())
    with enabled(model.model, PROFILES["online"]()):
        inside = logits(model)
        with pytest.raises(UnsupportedModelError, match="for a part of this model"):
            enable(model, PROFILES["online"]())
    with enabled(model, PROFILES["online"]()):
        assert torch.equal(logits(model), inside)


# ---- nothing stays behind


def finalizers():
    return len(weakref.finalize._registry)


def test_enabling_leaves_no_finalizer_behind():
    model = tiny_model("llama")
    enable(model, PROFILES["online"]())
    disable(model)
    gc.collect()
    before = finalizers()
    for _ in range(5):
        enable(model, PROFILES["online"]())
        enable(model, PROFILES["refit"]())
        disable(model)
    gc.collect()
    assert finalizers() == before
    enable(model, PROFILES["online"]())
    assert "chai" in AttentionInterface()
    del model
    gc.collect()
    assert finalizers() == before


# ---- a profile in force


@pytest.mark.parametrize("failure", ["adapter", "memory"])
def test_a_refit_that_cannot_be_applied_keeps_the_profile_in_force(failure, monkeypatch):
    model = tiny_model("llama")
    if failure == "adapter":
        add_lora(model, "o_proj")
    profile = PROFILES["online"]()
    enable(model, profile)
    want = logits(model)
    if failure == "adapter":
        expected = pytest.raises(UnsupportedModelError, match="merge the adapter")
    else:
        from chai_attention.integrations.transformers.corrections import Corrections

        replace_one = Corrections._replace

        def full(self, *args):
            replace_one(self, *args)
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(Corrections, "_replace", full)
        expected = pytest.raises(torch.OutOfMemoryError)
    with expected:
        enable(model, refit())
    assert torch.equal(logits(model), want)
    cache = ClusteredCache(model, profile)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    disable(model)
    assert output_weight(attention_modules(model)[0]).shape == (48, 48)
