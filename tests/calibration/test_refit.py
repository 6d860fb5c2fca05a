"""Refit output weights against an independent regression, and what they are good for."""

import pytest
import torch

from chai_attention.calibration.perplexity import token_loss
from chai_attention.calibration.refit import refit
from chai_attention.errors import CalibrationError
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.modules import (
    attention_modules,
    output_projection,
    output_weight,
)
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from helpers import random_representatives
from tiny_models import CONFIGS, tiny_model


def static_profile(model, clusters=(2, 3, 2), **fields):
    shape = describe(model)
    counts = [
        k if free else shape.heads for k, free in zip(clusters, shape.clusterable, strict=True)
    ]
    rep = tuple(tuple(random_representatives(shape.heads, k)[0].tolist()) for k in counts)
    return ClusterProfile(tuple(counts), membership="static", representatives=rep, **fields)


@torch.no_grad()
def through(model, layer, windows):
    """Inputs and outputs of a layer's output projection: ``[N, in]``, ``[N, out]`` float64."""
    found = []
    projection = output_projection(attention_modules(model)[layer])
    hook = projection.register_forward_hook(lambda m, args, out: found.extend((args[0], out)))
    model(windows)
    hook.remove()
    return [tensor.flatten(0, 1).double() for tensor in found]


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt", "gpt2"])
@pytest.mark.parametrize("kind", ["output", "bias"])
def test_every_layer_is_the_regression_on_what_reaches_it(family, kind):
    model = tiny_model(family)
    windows = torch.randint(3, 97, (12, 20))
    profile = static_profile(model)
    found = refit(model, profile, windows, kind=kind, batch_size=4)
    assert found.refit == {"kind": kind}
    assert len(found.corrections) == 3
    done = {}
    for layer in range(3):
        name = f"layers.{layer}.{'weight' if kind == 'output' else 'bias'}"
        wanted = through(model, layer, windows)[1]
        partly = ClusterProfile(
            profile.clusters, membership="static", representatives=profile.representatives,
            refit={"kind": kind}, corrections=done,
        )  # fmt: skip
        with enabled(model, partly):
            inputs, before = through(model, layer, windows)
        rest = wanted - before
        got = found.corrections[name].double()
        if kind == "bias":
            torch.testing.assert_close(got, rest.mean(0), atol=1e-5, rtol=1e-4)
        else:
            change = got - output_weight(attention_modules(model)[layer]).double()
            # the gradient of the ridge regression is zero at its answer, for one of the ridges
            pull = (rest - inputs @ change.T).T @ inputs  # = ridge * mean square * change
            ridge = (pull * change).sum() / change.square().sum()
            ridge = ridge / inputs.square().sum(0).mean()
            assert min(abs(ridge / r - 1) for r in (0.03, 0.1, 0.3, 1.0, 3.0)) < 1e-3
            ideal = ridge * inputs.square().sum(0).mean() * change
            torch.testing.assert_close(pull, ideal, atol=1e-3 * float(pull.abs().max()), rtol=0)
        done[name] = found.corrections[name]


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("membership", ["static", "online"])
def test_every_family_can_be_refit(family, membership):
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profile = static_profile(model, recent=4, sinks=1)
    if membership == "online":
        profile = ClusterProfile(profile.clusters, window=5)
    windows = torch.randint(3, 97, (6, 20))
    found = refit(model, profile, windows, kind="output", batch_size=4)
    assert set(found.corrections) == {
        f"layers.{i}.weight" for i, k in enumerate(profile.clusters) if k < 6
    }
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with enabled(model, found), torch.no_grad():
        model(windows)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_refit_that_does_not_help_is_dropped():
    model = tiny_model("llama")
    profile = static_profile(model)
    windows = torch.randint(3, 97, (6, 20))
    with enabled(model, refit(model, profile, windows, kind="output")):
        loss = token_loss(model, windows).mean
    with enabled(model, profile):
        better = loss < token_loss(model, windows).mean
    found = refit(model, profile, windows, kind="output", held_out=windows)
    assert (found.corrections is not None) == better
    if not better:
        assert "did not help" in found.provenance["refit"]


def test_nothing_to_refit():
    model = tiny_model("llama")
    profile = ClusterProfile((6, 6, 6))
    assert refit(model, profile, torch.randint(3, 97, (4, 9)), kind="output") == profile


def test_bad_requests():
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match="output or bias"):
        refit(model, static_profile(model), torch.ones(4, 9, dtype=torch.long), kind="all")
    profile, windows = static_profile(model), torch.ones(4, 9, dtype=torch.long)
    with enabled(model, profile), pytest.raises(CalibrationError, match="disable"):
        refit(model, profile, windows, kind="output")
    with pytest.raises(CalibrationError, match="at least 2 sequences"):
        refit(model, static_profile(model), torch.ones(1, 9, dtype=torch.long), kind="bias")


def test_a_refit_helps_a_real_model(shared):
    """Half of mha-lm's heads at random: the refit wins back part of the loss on unseen text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "mha-lm"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared / "data" / "mha-lm-valid.txt").read_text()[:200_000]
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = tokens[: 32 * 128].view(32, 128)
    rep = tuple(tuple(random_representatives(16, 8)[0].tolist()) for _ in range(14))
    profile = ClusterProfile((8,) * 14, membership="static", representatives=rep)
    found = refit(model, profile, windows[:24], kind="output", held_out=windows[24:])
    assert found.corrections is not None
    losses = []
    for candidate in (profile, found):
        with enabled(model, candidate):
            losses.append(token_loss(model, windows[24:]).mean)
    assert losses[1] < losses[0] - 0.05
