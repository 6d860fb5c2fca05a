"""Steps whose layers are captured in several graphs: recorded and replayed on the CPU."""

from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

from chai_attention.benchmarking import split_steps
from chai_attention.benchmarking.split_steps import SplitRunner, runs_of
from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.modules import decoder_layers
from chai_attention.profile import ClusterProfile
from recorded_graph import played
from tiny_models import tiny_model

REP = ((0, 0, 4, 4, 4, 0), (0, 1, 2, 3, 4, 5), (3, 1, 1, 3, 3, 5))
KINDS = {
    "fused": None,
    "unfused": None,
    "static": {"membership": "static", "representatives": REP},
    "online": {"window": 6},
    "window": {"window": 6, "recent": 5, "sinks": 3},
}


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 3], ids=lambda cut: f"{cut} layers in the first run")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt"])
def test_a_step_in_several_graphs_is_the_step(family, kind, cut, monkeypatch):
    model = tiny_model(family)
    layers = decoder_layers(model)
    monkeypatch.setattr(
        split_steps, "runs_of", lambda model: [layers[:cut], layers[cut:]][: 4 - cut]
    )
    model.set_attn_implementation("eager" if kind == "unfused" else "sdpa")
    options = KINDS[kind]
    profile = None if options is None else ClusterProfile(clusters=(2, 6, 3), **options)
    with enabled(model, profile) if profile is not None else nullcontext():
        runner = SplitRunner(model, profile, 60)
        for seed in (0, 1):  # graphs of an earlier prompt are not those of a later one
            ids = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(seed))
            cache = DynamicCache(config=model.config)
            want = model(ids[:, :40], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(runner.prefill(ids[:, :40]), want)
            with played(monkeypatch):
                for at in range(40, 50):
                    token = ids[:, at : at + 1]
                    want = model(token, past_key_values=cache).logits[:, -1]
                    torch.testing.assert_close(runner.step(token), want, atol=2e-5, rtol=1e-5)
            assert runner.memory().tokens == 50
    assert all("forward" not in vars(layer) for layer in layers)


@torch.no_grad()
def test_no_mask_grows_from_step_to_step(monkeypatch):
    # OPT of transformers 5.17 makes a mask of all tokens where it is given none
    model, seen = tiny_model("opt"), []
    profile = ClusterProfile(clusters=(2, 6, 3), window=6)
    with enabled(model, profile), played(monkeypatch):
        runner = SplitRunner(model, profile, 60)
        runner.prefill(torch.randint(3, 97, (2, 40)))
        hook = lambda module, args, options: seen.append(options["attention_mask"].shape)  # noqa: E731
        with model.register_forward_pre_hook(hook, with_kwargs=True):
            for _ in range(3):
                runner.step(torch.tensor([[5], [7]]))
    assert set(seen) == {(2, 60)}


@torch.no_grad()
def test_layers_with_masks_of_their_own_are_refused():
    model, hidden = tiny_model("opt"), torch.randn(1, 1, 48)
    run = split_steps._Run(decoder_layers(model))
    masks = [torch.ones(1, 1, 1, 1, dtype=torch.bool) for _ in range(2)]
    run.observe(0, hidden, attention_mask=masks[0])
    run.observe(1, hidden, attention_mask=masks[0])
    with pytest.raises(UnsupportedModelError, match="different masks"):
        run.observe(2, hidden, attention_mask=masks[1])


def test_runs_are_cut_where_devices_change():
    model = tiny_model("llama")
    layers = decoder_layers(model)
    assert runs_of(model) == [layers]
    layers[1].to("meta")
    assert runs_of(model) == [layers[:1], layers[1:2], layers[2:]]
