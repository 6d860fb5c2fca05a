"""Losses can be evaluated while clustered heads are enabled; wrong gradients are never computed."""

import pytest
import torch
from torch import nn

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import disable, enable
from chai_attention.profile import ClusterProfile
from lora import add_lora
from tiny_models import tiny_model

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
PROFILES = {
    "clusters": ClusterProfile((2, 6, 3), window=8),
    "every-head-its-own": ClusterProfile((6, 6, 6)),
    "static": ClusterProfile((2,) * 3, "static", representatives=((0, 0, 0, 3, 3, 3),) * 3),
    "window": ClusterProfile((2, 6, 3), window=4, recent=3, sinks=1),
}


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("train", [False, True])
def test_a_training_step_is_refused_instead_of_wrong(name, train):
    model = tiny_model("llama").train(train)
    enable(model, PROFILES[name])
    with pytest.raises(UnsupportedModelError, match=r"disable\(model\) before training"):
        model(IDS, labels=IDS).loss.backward()
    disable(model)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("target", ["q_proj", "v_proj", "o_proj"])
def test_an_adapter_gets_no_wrong_gradient(target):
    model = tiny_model("llama").requires_grad_(False)
    add_lora(model, target)
    enable(model, PROFILES["clusters"])
    with pytest.raises(UnsupportedModelError, match="no gradients"):
        model(IDS, labels=IDS).loss.backward()


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model("llama").train()
    # the second name came with transformers 5.23
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)()
    enable(model, PROFILES["clusters"])
    with pytest.raises(UnsupportedModelError, match="no gradients"):
        model(IDS, labels=IDS, use_cache=False).loss.backward()


def test_a_loss_is_the_same_however_it_is_evaluated():
    model = tiny_model("llama")
    enable(model, PROFILES["clusters"])
    loss = model(IDS, labels=IDS).loss
    with torch.no_grad():
        assert torch.equal(model(IDS, labels=IDS).loss, loss)
    with torch.inference_mode():
        assert torch.equal(model(IDS, labels=IDS).loss, loss)


def test_what_lies_behind_all_attention_can_be_trained():
    """No gradient of a head on top leads through attention, so each is right."""
    model = tiny_model("llama").requires_grad_(False)
    probe = nn.Linear(48, 2)
    enable(model, PROFILES["clusters"])
    hidden = model.model(IDS).last_hidden_state
    probe(hidden).sum().backward()
    torch.testing.assert_close(probe.weight.grad[0], hidden.sum((0, 1)))
