"""Projections without removed heads: same results, fewer bytes, and whole again afterwards."""

import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn

from chai_attention.errors import UnsupportedModelError
from chai_attention.integrations.transformers import (
    ClusteredCache,
    disable,
    enable,
    enabled,
    projections,
    saved_weight_bytes,
)
from chai_attention.integrations.transformers.support import attention_modules, describe
from chai_attention.profile import ClusterProfile
from tiny_models import ATTENTION, COMMON, CONFIGS, GROUPED, SIZES, TOKENS, tiny_model

COMPACT = (
    "llama", "llama-grouped", "mistral", "qwen2", "qwen3", "phi", "gemma", "gemma-one", "gemma2",
    "gemma3", "cohere", "olmo", "granite", "starcoder2",
)  # fmt: skip
SPREAD = ("opt", "gpt2", "gpt_neox", "phi3", "stablelm")
WHOLE = ("olmo2", "olmo3", "cohere-norms")
OTHERS = {
    "llama-bias": lambda: tf.LlamaConfig(**COMMON, **ATTENTION, attention_bias=True),
    "phi-norms": lambda: tf.PhiConfig(**COMMON, **ATTENTION, qk_layernorm=True),
    "stablelm-norms": lambda: tf.StableLmConfig(**COMMON, **GROUPED, qk_layernorm=True),
    "smollm3": lambda: tf.SmolLM3Config(**COMMON, **GROUPED),
    "granite-all-heads": lambda: tf.GraniteConfig(**COMMON, **ATTENTION),
    "phi3-all-heads": lambda: tf.Phi3Config(**COMMON, **ATTENTION),
    "opt-no-bias": lambda: tf.OPTConfig(
        **SIZES, **TOKENS, num_attention_heads=6, ffn_dim=40, word_embed_proj_dim=48,
        max_position_embeddings=256, enable_bias=False,
    ),
}  # fmt: skip
# clusters whose slots are not their members, and a K/V head (of 2) that nobody needs
MAPS = ((4, 5, 5, 5, 4, 5), (0, 1, 2, 3, 4, 5), (2, 4, 2, 3, 4, 2))


def model_of(name):
    torch.manual_seed(1)
    config = (CONFIGS | OTHERS)[name]()
    config.initializer_range = 0.2
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for module in attention_modules(model).values():  # norms that differ from head to head
        for parameter_name, parameter in module.named_parameters():
            if "norm" in parameter_name:
                nn.init.normal_(parameter, 1.0, 0.3)
    return model


def profile_for(model, maps=MAPS, **settings):
    shape = describe(model)
    own = tuple(range(shape.heads))
    rows = [row if free else own for row, free in zip(maps, shape.clusterable, strict=True)]
    clusters = tuple(len(set(row)) for row in rows)
    return ClusterProfile(clusters, "static", representatives=tuple(rows), **settings)


@contextmanager
def all_rows(monkeypatch):
    """Enable without cutting anything, as before there were cuts."""
    with monkeypatch.context() as patch:
        patch.setattr(projections, "find_cuts", lambda *args: [])
        yield


def ids(length=20, batch=2):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(0))


def parameter_bytes(model):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def removed_bytes(model, profile):
    """Rows of W_Q and W_K, and of their biases, that nobody needs, by the definition."""
    shape, size = describe(model), 0
    module = attention_modules(model)[2]
    biased = any(getattr(x, "bias", None) is not None for x in (*module.children(),)[:3])
    for row in profile.representatives:
        heads = shape.heads - len(set(row))
        heads += shape.kv_heads - len({r * shape.kv_heads // shape.heads for r in row})
        size += heads * shape.head_dim * (48 + biased)
    return size * model.dtype.itemsize


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CONFIGS) + sorted(OTHERS))
def test_results_stay_and_bytes_go(name, monkeypatch, caplog):
    model = model_of(name)
    profile = profile_for(model)
    before = parameter_bytes(model)
    with all_rows(monkeypatch), enabled(model, profile):
        assert saved_weight_bytes(model) == 0
        want = model(ids()).logits
        tokens = model.generate(ids(7), max_new_tokens=6, do_sample=False)
    with caplog.at_level(logging.INFO, "chai_attention"), enabled(model, profile):
        if name in WHOLE:
            assert saved_weight_bytes(model) == 0
            layers = "0, 2" if describe(model).clusterable[0] else "2"
            assert f"Q and K of removed heads are computed in layers {layers}: " in caplog.text
            assert "q_norm is not a norm over one head" in caplog.text
        else:
            assert saved_weight_bytes(model) == removed_bytes(model, profile) > 0
            assert not [
                record for record in caplog.records if record.name.startswith("chai_attention")
            ]
        assert parameter_bytes(model) == before - saved_weight_bytes(model)
        torch.testing.assert_close(model(ids()).logits, want, atol=2e-5, rtol=2e-5)
        got = model.generate(ids(7), max_new_tokens=6, do_sample=False)
        assert torch.equal(got, tokens)
    assert parameter_bytes(model) == before


@torch.no_grad()
@pytest.mark.parametrize("family", COMPACT)
def test_compact_heads_come_out_as_the_cache_holds_them(family):
    """No gather at run time: Q in slot order, K and V in the order of the cache."""
    model = tiny_model(family)
    shape, module = describe(model), attention_modules(model)[2]
    hidden = torch.randn(1, 3, 48)

    def heads(projection):
        return projection(hidden).unflatten(-1, (-1, shape.head_dim))

    query, key, value = (heads(getattr(module, f"{name}_proj")) for name in "qkv")
    with enabled(model, profile_for(model)):
        order = [0, 2, 5, 3, 1, 4] if shape.group_size == 1 else list(range(shape.kv_heads))
        kept = [2, 3, 4] if shape.group_size == 1 else list(range(shape.kv_heads))
        for projection, want in (
            (module.q_proj, query[:, :, [2, 3, 4]]),
            (module.k_proj, key[:, :, kept]),
            (module.v_proj, value[:, :, order]),
        ):
            torch.testing.assert_close(heads(projection), want)
            assert projection.out_features == projection.weight.shape[0]
            assert not projection._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("family", SPREAD)
def test_spread_heads_stand_where_the_family_expects_them(family):
    model = tiny_model(family)
    cut = {
        "gpt2": "c_attn", "gpt_neox": "query_key_value", "phi3": "qkv_proj",
    }.get(family, "q_proj")  # fmt: skip
    projection, hidden = getattr(attention_modules(model)[2], cut), torch.randn(1, 3, 48)
    want = projection(hidden).unflatten(-1, (-1, 8))
    needed = {
        "gpt2": [2, 3, 4, 8, 9, 10, 12, 13, 14, 15, 16, 17],
        "gpt_neox": [2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 17],
        "phi3": [2, 3, 4, 6, 7, 8, 9],
    }.get(family, [2, 3, 4])
    with enabled(model, profile_for(model)):
        got = projection(hidden).unflatten(-1, (-1, 8))
        assert projection.weight.numel() == len(needed) * 8 * 48
    assert got.shape == want.shape
    torch.testing.assert_close(got[:, :, needed], want[:, :, needed])


@pytest.mark.parametrize("family", SPREAD)
def test_a_copy_has_to_be_worth_it(family, caplog):
    """One head of six is much of W_Q alone, and little of a projection that makes V, too."""
    model = tiny_model(family)
    with caplog.at_level(logging.INFO, "chai_attention"):
        enable(model, profile_for(model, maps=((0, 1, 2, 3, 4, 4),) * 3))
    fused = family in ("gpt2", "gpt_neox", "phi3")
    assert ("fewer than 12.5% of a projection's rows" in caplog.text) == fused
    assert (saved_weight_bytes(model) == 0) == fused


def test_every_family_is_in_the_table():
    assert sorted(COMPACT + SPREAD + WHOLE) == sorted(CONFIGS)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CONFIGS) + sorted(OTHERS))
def test_disable_restores_every_bit(name):
    model, untouched = model_of(name), model_of(name)
    objects = {name: id(p) for name, p in model.named_parameters()}
    attributes = [
        {key: value for key, value in vars(m).items() if not key.startswith("_")}
        for m in model.modules()
    ]
    want = model(ids()).logits
    enable(model, profile_for(model))
    enable(model, profile_for(model, maps=MAPS[::-1]))
    disable(model)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    for got, weight in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(got, weight)
    assert torch.equal(model(ids()).logits, want)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks")
    assert not any(getattr(m, hook) for m in model.modules() for hook in hooks)
    assert attributes == [
        {key: value for key, value in vars(m).items() if not key.startswith("_")}
        for m in model.modules()
    ]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_cast_meanwhile_is_one_dtype_again(family):
    model, cast = tiny_model(family), tiny_model(family).to(torch.bfloat16)
    enable(model, profile_for(model))
    model.to(torch.bfloat16)
    model(ids())
    disable(model)
    for got, want in zip(model.parameters(), cast.parameters(), strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)


@torch.no_grad()
def test_other_profiles_cut_nothing():
    model = tiny_model("llama")
    static = profile_for(model)
    for profile in (
        replace(static, recent=4, sinks=1),
        ClusterProfile((2, 6, 3), window=8),
        ClusterProfile((6, 6, 6), "static", representatives=(MAPS[1],) * 3),
    ):
        with enabled(model, profile):
            assert saved_weight_bytes(model) == 0
    assert saved_weight_bytes(model) == 0


class _Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def special(kind, model):
    """Make something about layer 2 special."""
    module = attention_modules(model)[2]
    projection = module.q_proj
    if kind == "subclass":
        projection.__class__ = _Tripled
    elif kind == "hook":
        projection.register_forward_hook(lambda module, args, out: 3 * out)
    elif kind == "own-forward":
        projection.forward = lambda x: 3 * nn.functional.linear(x, projection.weight)
    elif kind == "attention-forward":
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    elif kind == "tied":
        module.k_proj.weight = projection.weight
    elif kind == "tensor-subclass":
        weight = projection.weight.detach().as_subclass(_Special)
        projection.weight = nn.Parameter(weight, requires_grad=False)
    elif kind == "parameter":
        module.gain = nn.Parameter(torch.ones(6))
    elif kind == "norm":
        module.q_norm = nn.LayerNorm(48)
    else:
        module.q_norm = nn.RMSNorm(8, elementwise_affine=False)


class _Special(torch.Tensor):
    pass


SPECIAL = {
    "subclass": "is a _Tripled, not a Linear",
    "hook": "has hooks or buffers",
    "own-forward": "has hooks or buffers",
    "attention-forward": "forward of LlamaAttention has been replaced",
    "tied": "shares its weights",
    "tensor-subclass": "of a special kind",
    "parameter": "has parameters of its own",
    "norm": "q_norm is not a norm over one head",
    "bare-norm": "q_norm is not a norm over one head",
}


@torch.no_grad()
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_projections_stay_whole(kind, monkeypatch, caplog):
    model = tiny_model("llama")
    special(kind, model)
    profile = profile_for(model)
    with all_rows(monkeypatch), enabled(model, profile):
        want = model(ids()).logits
    with caplog.at_level(logging.INFO, "chai_attention"), enabled(model, profile):
        modules = attention_modules(model)
        assert modules[0].q_proj.weight.shape[0] == 16, "other layers are cut"
        assert modules[2].q_proj.weight.shape[0] == 48
        torch.testing.assert_close(model(ids()).logits, want)
    assert "in layers 2: " in caplog.text
    assert SPECIAL[kind] in caplog.text


def test_offloaded_and_quantised_weights_stay_whole(caplog):
    for weight in (torch.empty(48, 48, device="meta"), torch.zeros(48, 48, dtype=torch.int8)):
        model = tiny_model("llama")
        module = attention_modules(model)[2]
        module.k_proj.weight = nn.Parameter(weight, requires_grad=False)
        with caplog.at_level(logging.INFO, "chai_attention"), enabled(model, profile_for(model)):
            assert module.q_proj.weight.shape == module.k_proj.weight.shape == (48, 48)
        assert "quantised, offloaded or of a special kind" in caplog.text
        caplog.clear()


@torch.no_grad()
def test_code_that_is_not_known_stays_whole(caplog):
    """A norm over the whole projection that no module and no parameter tells of."""
    model = tiny_model("llama")
    kind = type(attention_modules(model)[0])
    scope: dict = {}
    source = """
def forward(self, hidden_states, position_embeddings=None, attention_mask=None,
            past_key_values=None, **kwargs):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query = functional.normalize(self.q_proj(hidden_states), dim=-1).view(shape).transpose(1, 2)
    key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
    value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    out = attend(self, query, key, value, None)[0]
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None
"""
    scope.update(vars(__import__(kind.__module__, fromlist=["x"])), functional=nn.functional)
    exec(source, scope)
    own = type("OwnAttention", (kind,), {"forward": scope["forward"]})
    for module in attention_modules(model).values():
        module.__class__ = own
    with caplog.at_level(logging.INFO, "chai_attention"), enabled(model, profile_for(model)):
        assert saved_weight_bytes(model) == 0
        model(ids())
    assert "OwnAttention is not known to treat every head by itself: it uses normalize" in (
        caplog.text
    )


def test_a_failure_in_the_middle_leaves_the_weights_as_they_were(monkeypatch):
    model, untouched = tiny_model("opt"), tiny_model("opt")
    spread, calls = projections._Spread, []

    def full(*args):
        calls.append(args)
        if len(calls) == 4:  # in the second cut layer, Q is cut already
            raise torch.OutOfMemoryError("no memory")
        return spread(*args)

    monkeypatch.setattr(projections, "_Spread", full)
    with pytest.raises(torch.OutOfMemoryError):
        enable(model, profile_for(model))
    assert model.config._attn_implementation != "chai"
    model.load_state_dict(untouched.state_dict())
    assert torch.equal(model(ids()).logits, untouched(ids()).logits)


@torch.no_grad()
def test_a_device_that_is_full_can_be_freed_and_asked_again(monkeypatch):
    model, untouched = tiny_model("llama"), tiny_model("llama")
    profile = profile_for(model)
    enable(model, profile)
    want = model(ids()).logits
    whole, calls = projections._CutProjection.whole, []

    def full(self):
        calls.append(self)
        if len(calls) == 5:  # after layer 2, in the middle of layer 0
            raise torch.OutOfMemoryError("no memory")
        return whole(self)

    monkeypatch.setattr(projections._CutProjection, "whole", full)
    with pytest.raises(torch.OutOfMemoryError):
        disable(model)
    torch.testing.assert_close(model(ids()).logits, want)
    assert 0 < saved_weight_bytes(model) < removed_bytes(model, profile)
    disable(model)
    for got, weight in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(got, weight)


def test_an_enabled_model_is_not_saved_without_its_rows(tmp_path):
    model = tiny_model("llama")
    with enabled(model, profile_for(model)):
        for save in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
            with pytest.raises(UnsupportedModelError, match=r"disable\(model\) before saving"):
                save()
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids()).logits, model(ids()).logits)


@torch.no_grad()
def test_a_cache_does_not_care_how_q_and_k_were_made(monkeypatch):
    """One made for the profile before `enable`, filled by whole projections, read by cut ones."""
    model = tiny_model("llama")
    profile = profile_for(model)
    cache = ClusteredCache(model, profile)
    with enabled(model, profile):
        want = model(ids()).logits
    with all_rows(monkeypatch), enabled(model, profile):
        first = model(ids()[:, :9], past_key_values=cache).logits
    with enabled(model, profile):
        second = model(ids()[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], 1), want, atol=1e-5, rtol=1e-5)
    memory = cache.memory()
    assert memory.key_bytes * 18 == memory.full_key_bytes * 11
    assert memory.value_bytes == memory.full_value_bytes


def test_beams_and_drafts_are_as_before(monkeypatch):
    model, draft = tiny_model("llama"), tiny_model("llama-grouped")
    profile = profile_for(model)
    options = [{"num_beams": 3}, {"assistant_model": draft, "do_sample": False}]
    for option in options:
        run = {"max_new_tokens": 8, **option}
        with all_rows(monkeypatch), enabled(model, profile):
            want = model.generate(ids(7, 1), **run)
        with enabled(model, profile):
            assert torch.equal(model.generate(ids(7, 1), **run), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gpu_holds_fewer_bytes(family):
    config = tiny_model(family).config
    config.update({"n_embd" if family == "gpt2" else "hidden_size": 768, "head_dim": 128})
    model = tf.AutoModelForCausalLM.from_config(config).eval().to("cuda")
    untouched = {name: p.cpu().clone() for name, p in model.named_parameters()}
    profile = profile_for(model)

    def held() -> int:  # without what the allocator rounds up to
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    before = held()
    with enabled(model, profile):
        freed = before - held()
        saved = saved_weight_bytes(model)
        assert saved > 1_000_000
        assert abs(freed - saved) < 50_000  # tables
        want = model(ids().cuda()).logits
        model.cpu()
        got = model(ids()).logits
    torch.testing.assert_close(got, want.cpu(), atol=1e-3, rtol=1e-3)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, untouched[name])
