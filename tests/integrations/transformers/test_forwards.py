"""Before a forward: arguments however they come, and facts that are those of this forward alone."""

import inspect

import pytest
import torch
from transformers import DynamicCache, StaticCache

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import (
    ClusteredCache,
    StaticClusteredCache,
    disable,
    enable,
    enabled,
)
from chai_attention.profile import ClusterProfile
from tiny_models import tiny_model

PROFILE = ClusterProfile(clusters=(2, 6, 3), window=8)
ALL_HEADS = ClusterProfile(clusters=(6, 6, 6))


def prompt(length, batch=1, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# ---- facts of one forward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("profile", [PROFILE, ALL_HEADS], ids=["clusters", "every-head"])
def test_a_mask_that_is_changed_in_place_is_read_anew(mode, profile):
    """A static input buffer: bool, of the same length, another padding in every call."""
    model = tiny_model("llama")
    ids = prompt(20, batch=2)
    with mode():
        buffer = torch.ones(2, 20, dtype=torch.bool)
        with enabled(model, profile):
            for lead in (0, 9, 4):
                buffer.fill_(True)
                buffer[1, :lead] = False
                got = model(ids, attention_mask=buffer).logits
                fresh = model(ids, attention_mask=buffer.clone()).logits
                assert torch.equal(got, fresh)
        if profile is ALL_HEADS:
            close(got[buffer], model(ids, attention_mask=buffer).logits[buffer])


@torch.no_grad()
def test_a_mask_by_kind_of_layer_is_read_anew():
    """As a caller may pass it to families with sliding windows."""
    model = tiny_model("gemma2")
    ids = prompt(20, batch=2)
    profile = ClusterProfile((6, 3, 3), window=8)
    sliding = torch.ones(20, 20, dtype=torch.bool).tril().triu(-7).expand(2, 1, 20, 20)
    buffer = torch.ones(2, 20, dtype=torch.bool)
    with enabled(model, profile):
        logits = []
        for lead in (0, 9):
            buffer[1, :lead] = False
            for one in (buffer, buffer.clone()):
                masks = {"full_attention": one, "sliding_attention": sliding}
                logits.append(model(ids, attention_mask=masks, use_cache=False).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[2], logits[3])
    assert not torch.equal(logits[0], logits[2])


# ---- arguments by position


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("kind", ["new", "plain", "static"])
def test_arguments_by_position(family, kind):
    """The cache is another position in every family: GPT-2's second argument."""
    model = tiny_model(family)
    grouped = family in ("qwen2", "gemma3")
    profile = ClusterProfile((6, 3, 3) if grouped else (2, 6, 3), window=8)
    enable(model, profile)
    ids, mask = prompt(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :12] = 0
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)

    def cache():
        if kind == "static":
            return StaticCache(config=model.config, max_cache_len=40)
        return ClusteredCache(model, profile) if kind == "new" else DynamicCache()

    for module in (model, model.base_model):
        known = list(inspect.signature(module.forward).parameters)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
        given = {name: value for name, value in given.items() if name in known}
        want = module(**given, past_key_values=cache())[0]
        before = [given.pop(name, None) for name in known[: known.index("past_key_values")]]
        held = cache()
        got = module(*before, held, **given)[0]
        real = mask.bool()
        close(got[real], want[real])
        assert isinstance(held, ClusteredCache | StaticClusteredCache)
        assert held.get_seq_length() == 20


@torch.no_grad()
def test_a_mask_by_position_reaches_a_static_cache():
    model = tiny_model("llama")
    enable(model, PROFILE)
    ids, mask = prompt(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got, want = (
        model.model(ids, mask, positions, past_key_values=cache).last_hidden_state
        for cache in (StaticClusteredCache(model, PROFILE, 40), ClusteredCache(model, PROFILE))
    )
    close(got[mask.bool()], want[mask.bool()])


@torch.no_grad()
def test_an_argument_given_twice_is_pythons_error():
    model = tiny_model("llama")
    enable(model, PROFILE)
    with pytest.raises(TypeError, match="multiple values"):
        model(prompt(4), None, None, DynamicCache(), past_key_values=DynamicCache())


@torch.no_grad()
def test_hooks_of_others_see_arguments_where_they_were():
    model = tiny_model("llama")
    enable(model, PROFILE)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = prompt(4)
    model(ids)
    assert seen[0] is ids


@torch.no_grad()
def test_a_compiled_call_takes_arguments_by_position():
    model = tiny_model("llama")
    enable(model, PROFILE)
    ids = prompt(9)
    assert torch.equal(model.get_compiled_call()(ids).logits, model(ids).logits)


# ---- whose attention, whose cache


@torch.no_grad()
def test_another_attention_under_an_enabled_model_is_refused():
    """It would take the new tokens' K for the whole cache."""
    model = tiny_model("llama")
    with enabled(model, PROFILE):
        cache = model(prompt(20)).past_key_values
        for part in (model, model.model):
            with pytest.raises(UnsupportedModelError, match="switched to 'sdpa'"):
                part.set_attn_implementation("sdpa")
        model(prompt(1), past_key_values=cache)
    model(prompt(4))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_without_a_config_or_of_another_one(family, static):
    model = tiny_model(family)
    ids = prompt(30)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(ids)
    plain = model.generate(ids, **options)
    other = tiny_model("llama").config
    other.num_hidden_layers = 2
    for clusters in ((6, 6, 6), (6, 3, 3)):
        enable(model, ClusterProfile(clusters, window=8))
        want = model.generate(ids, **options)
        if clusters == (6, 6, 6):
            assert torch.equal(want, plain)
        made = StaticCache(other, 60) if static else DynamicCache()
        assert torch.equal(model.generate(ids, past_key_values=made, **options), want)
        with torch.no_grad():
            made = StaticCache(other, 60) if static else DynamicCache()
            logits = model(ids, past_key_values=made).logits
            close(logits, model(ids, use_cache=False).logits)


# ---- inference mode


@pytest.mark.parametrize("window", [{}, {"recent": 5, "sinks": 3}], ids=["", "recent"])
@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("first", [True, False], ids=["inside-first", "outside-first"])
@pytest.mark.parametrize("length", [5, 40])
def test_inference_mode_for_some_forwards_only(first, kind, window, length):
    model = tiny_model("llama")
    profile = ClusterProfile((2, 6, 3), window=8, **window)
    enable(model, profile)
    ids, mask = prompt(60, batch=2), torch.ones(2, 60, dtype=torch.long)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    real = mask.bool()

    def run(cache, cuts, inside):
        parts, stop = [], 0
        for count in cuts:
            start, stop = stop, stop + count
            with torch.inference_mode(inside), torch.no_grad():
                out = model(
                    ids[:, start:stop], attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop], past_key_values=cache,
                )  # fmt: skip
                cache.reorder_cache(torch.tensor([0, 1]))
            parts.append(out.logits.clone())
            inside = not inside
        return torch.cat(parts, 1)[real[:, :stop]]

    cuts = [length, 1, 1, 7, 1]
    growing = kind == "growing"
    cache = ClusteredCache(model, profile) if growing else StaticClusteredCache(model, profile, 70)
    got = run(cache, cuts, first)
    total = sum(cuts)
    with torch.no_grad():
        want = model(
            ids[:, :total], attention_mask=mask[:, :total], position_ids=positions[:, :total],
            use_cache=False,
        ).logits[real[:, :total]]  # fmt: skip
    close(got, want)


def test_generate_goes_on_after_a_prefill_under_inference_mode():
    model = tiny_model("llama")
    enable(model, PROFILE)
    ids = prompt(30)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(ids)
    want = model.generate(ids, **options)
    for inside in (True, False):
        cache = ClusteredCache(model, PROFILE)
        with torch.inference_mode(inside), torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
        with torch.inference_mode(not inside):
            got = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(got, want)


def test_a_model_enabled_under_inference_mode_runs_outside_of_it():
    model = tiny_model("llama")
    ids = prompt(9)
    rep = ((0, 0, 0, 3, 3, 3),) * 3
    before = model(ids, use_cache=False).logits.detach()
    with torch.inference_mode():
        enable(model, ClusterProfile((2, 2, 2), "static", representatives=rep))
    assert model(ids, use_cache=False).loss is None  # gradients are on
    with torch.inference_mode():
        disable(model)
    assert torch.equal(model(ids, use_cache=False).logits, before)
