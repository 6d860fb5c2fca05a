"""Models inside other libraries' wrappers: found, or refused with what to pass instead."""

import pytest
import torch
from torch import nn

from chai_attention import ClusteredCache, calibrate
from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import (
    StaticClusteredCache,
    disable,
    enable,
    enabled,
)
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from lora import add_lora
from tiny_models import tiny_model

IDS = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(0))
PROFILE = ClusterProfile((2, 6, 3), window=4)


@torch.no_grad()
@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")]
)
def test_a_peft_model_is_enabled_around_its_base_model(targets):
    model = tiny_model("llama")
    wrapped = add_lora(model, *targets)
    plain = model(IDS).logits
    with enabled(model, PROFILE):
        want = model(IDS).logits
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert not torch.equal(want, plain)
    with enabled(wrapped, PROFILE):
        assert torch.equal(wrapped(input_ids=IDS).logits, want)
        cache = ClusteredCache(wrapped, PROFILE)
        got = wrapped.generate(
            input_ids=IDS, max_new_tokens=4, do_sample=False, past_key_values=cache
        )
        assert torch.equal(got, tokens)
        StaticClusteredCache(wrapped, PROFILE, max_tokens=20, batch_size=1)
    assert torch.equal(wrapped(input_ids=IDS).logits, plain)
    enable(wrapped, PROFILE)
    disable(wrapped)
    assert describe(wrapped) == describe(model)


WRAPPERS = {
    "torch.compile": (torch.compile, r"made by torch\.compile.*model\._orig_mod"),
    "data-parallel": (nn.DataParallel, r"parallel wrapper.*model\.module"),
    "sequential": (nn.Sequential, "not a Sequential"),
    "none": (lambda model: None, "not a NoneType"),
    "name": (lambda model: "llama", "not a str"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_other_wrappers_are_refused_with_what_to_pass(name):
    wrap, message = WRAPPERS[name]
    model = tiny_model("llama")
    wrapped = wrap(model)
    for call in (
        lambda: enable(wrapped, PROFILE),
        lambda: disable(wrapped),
        lambda: describe(wrapped),
        lambda: enabled(wrapped, PROFILE).__enter__(),
        lambda: ClusteredCache(wrapped, PROFILE),
    ):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == "sdpa"


TEXT = torch.randint(3, 97, (12, 24), generator=torch.Generator().manual_seed(0))
OPTIONS = {"samples": 4, "length": 24, "held_out": 2, "window": 4, "recent": 4, "sinks": 1}


def test_a_peft_model_is_calibrated_like_its_base_model():
    model = tiny_model("llama")
    wrapped = add_lora(model, "q_proj", "v_proj")
    options = {**OPTIONS, "removed": 0.2}
    assert calibrate(wrapped, None, TEXT, **options) == calibrate(model, None, TEXT, **options)


def test_a_refit_of_an_adapter_is_refused_before_calibration_starts():
    wrapped = add_lora(tiny_model("llama"), "o_proj")
    steps = []
    with pytest.raises(UnsupportedModelError, match="merge the adapter"):
        calibrate(
            wrapped, None, TEXT, **OPTIONS, removed=0.2, refit="output",
            progress=lambda *step: steps.append(step),
        )  # fmt: skip
    assert not steps


def test_a_compiled_model_is_not_calibrated():
    with pytest.raises(UnsupportedModelError, match=r"model\._orig_mod"):
        calibrate(torch.compile(tiny_model("llama")), None, TEXT, **OPTIONS, removed=0.2)
