"""Families that the config lets pass and that cannot run are found by running a few tokens."""

import pytest
import torch
import transformers as tf
from transformers.models.qwen3 import modeling_qwen3

from chai_attention.errors import ProfileError, UnsupportedModelError
from chai_attention.integrations.transformers import enable, enabled, trial
from chai_attention.integrations.transformers.modules import attention_modules
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from tiny_models import ATTENTION, COMMON, CONFIGS, GROUPED, SLIDING, by_definition, tiny_model

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0

RUN = {
    "arcee": lambda: tf.ArceeConfig(**COMMON, **GROUPED),
    "biogpt": lambda: tf.BioGptConfig(**COMMON, num_attention_heads=6),
    "cohere2": lambda: tf.Cohere2Config(**COMMON, **GROUPED, layer_types=SLIDING, sliding_window=8),
    "ernie4_5": lambda: tf.Ernie4_5Config(**COMMON, **GROUPED),
    "glm": lambda: tf.GlmConfig(**COMMON, **GROUPED, head_dim=8),
    "glm4": lambda: tf.Glm4Config(**COMMON, **GROUPED, head_dim=8),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(
        n_embd=48, n_layer=3, n_head=6, vocab_size=97, n_positions=256
    ),
    "granitemoe": lambda: tf.GraniteMoeConfig(**COMMON, **GROUPED, num_local_experts=4),
    "helium": lambda: tf.HeliumConfig(**COMMON, **GROUPED, head_dim=8),
    "mixtral": lambda: tf.MixtralConfig(
        **COMMON, **GROUPED, num_local_experts=4, sliding_window=None
    ),
    "nemotron": lambda: tf.NemotronConfig(**COMMON, **GROUPED),
    "olmoe": lambda: tf.OlmoeConfig(**COMMON, **GROUPED, num_experts=4, num_experts_per_tok=2),
    "persimmon": lambda: tf.PersimmonConfig(**COMMON, num_attention_heads=6),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **COMMON, **GROUPED, **MOE, shared_expert_intermediate_size=24
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**COMMON, **GROUPED, **MOE, head_dim=8),
    "smollm3": lambda: tf.SmolLM3Config(**COMMON, **GROUPED),
}

REFUSED = {
    "diffllama": (lambda: tf.DiffLlamaConfig(**COMMON, **ATTENTION), "computes something else"),
    "doge": (lambda: tf.DogeConfig(**COMMON, **GROUPED), "IndexError"),
    "jetmoe": (
        lambda: tf.JetMoeConfig(
            **COMMON, num_key_value_heads=3, kv_channels=8, num_local_experts=4,
            num_experts_per_tok=2,
        ),
        "heads",
    ),
    "gemma3n": (
        lambda: tf.Gemma3nTextConfig(
            **{**COMMON, "num_hidden_layers": 4, "intermediate_size": [40] * 4}, **GROUPED,
            head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97,
            layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
            sliding_window=8, laurel_rank=4, altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        "layer 3 takes K from layer 1",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(trial, "_passed", set())


def model_of(config):
    torch.manual_seed(1)
    config.initializer_range = 0.2
    return tf.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", RUN)
def test_a_family_that_works_is_not_refused_and_is_the_definition(family):
    model = model_of(RUN[family]())
    shape = describe(model)
    clusters = tuple(3 if free else 6 for free in shape.clusterable)
    maps = tuple((0, 0, 2, 2, 4, 4) if free else tuple(range(6)) for free in shape.clusterable)
    profile = ClusterProfile(clusters, "static", representatives=maps)

    def rule(layer, query, key, value, valid, scale):
        return torch.tensor(maps[layer]).expand(*query.shape[:3:2], 6)

    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with by_definition(model, rule):
        want = model(**inputs).logits[MASK.bool()]
    run = {**inputs, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**run)
    with enabled(model, profile):
        got = model(**inputs).logits[MASK.bool()]
    torch.testing.assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)
    with enabled(model, ClusterProfile((6,) * 3)):
        assert torch.equal(model.generate(**run), tokens)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_run_is_refused_when_it_is_enabled(family):
    config, reason = REFUSED[family]
    model = model_of(config())
    shape = describe(model)
    with torch.no_grad():
        want = model(IDS).logits
    names = [set(vars(module)) for module in model.modules()]
    profile = ClusterProfile((shape.heads,) * shape.layers)
    for _ in range(2):
        with pytest.raises(
            UnsupportedModelError, match=f"cannot run with clustered heads.*({reason})"
        ) as caught:
            enable(model, profile)
        assert "\n" not in str(caught.value)
    assert [set(vars(module)) for module in model.modules()] == names
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, want)


# ---- the next such family, made up


def own_family(change):
    """A Qwen3 with attention of its own, as a family that nobody knows of would have it."""
    scope = dict(vars(modeling_qwen3))
    exec(change, scope)
    model = model_of(CONFIGS["qwen3"]())
    kind = type("NewAttention", (modeling_qwen3.Qwen3Attention,), {"forward": scope["forward"]})
    for module in attention_modules(model).values():
        module.__class__ = kind
    return model


FORWARD = """
def forward(self, hidden_states, position_embeddings=None, attention_mask=None,
            past_key_values=None, **kwargs):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
    key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
    value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    extra = {}
    CHANGE
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )
    out = attend(self, query, key, value, attention_mask, scaling=self.scaling, **extra)[0]
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None

def eager_attention_forward(module, query, key, value, mask, scaling, bias=None, **kwargs):
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores = query @ key.mT * scaling
    scores = scores if mask is None else scores + mask
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ value).transpose(1, 2), None
"""
CHANGES = {
    "nothing": ("pass", None),
    "a bias that only its own code knows": (
        "extra = {'bias': torch.arange(key.shape[2]) * 0.5}", "layer 0 computes something else"
    ),
    "a 4D mask": (
        "attention_mask = torch.zeros(1, 1, query.shape[2], key.shape[2])", "4D mask"
    ),
    "K and V of all heads": (
        "key, value = (repeat_kv(x, 3) for x in (key, value))", "brings K of 6 heads"
    ),
    "attention twice": (
        "eager_attention_forward if self.config._attn_implementation == 'sdpa' else "
        "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]"
        "(self, query, key, value, attention_mask, scaling=self.scaling)",
        "attends more than once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_family_is_found_by_its_attention(name, monkeypatch):
    change, reason = CHANGES[name]
    model = own_family(FORWARD.replace("CHANGE", change))
    code = type(attention_modules(model)[0])
    scope: dict = dict(vars(modeling_qwen3))
    exec(FORWARD, scope)
    own = scope["eager_attention_forward"]
    monkeypatch.setitem(trial.sys.modules, code.__module__, type("Code", (), {
        "eager_attention_forward": staticmethod(own), "ALL_ATTENTION_FUNCTIONS": None,
    }))  # fmt: skip
    if reason is None:
        enable(model, ClusterProfile((6, 6, 6)))
        return
    with pytest.raises(UnsupportedModelError, match=reason):
        enable(model, ClusterProfile((6, 6, 6)))


# ---- what it costs


def forwards(model):
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


def test_tested_families_run_nothing_and_others_once():
    model = tiny_model("llama")
    calls = forwards(model)
    enable(model, ClusterProfile((6, 6, 6)))
    assert not calls
    model = model_of(RUN["arcee"]())
    calls = forwards(model)
    for _ in range(3):
        with enabled(model, ClusterProfile((6, 6, 6))):
            pass
    assert len(calls) == 1
    again = model_of(RUN["arcee"]())
    calls = forwards(again)
    enable(again, ClusterProfile((6, 6, 6)))
    assert not calls, "the same class and config"


def test_the_mode_and_the_random_numbers_stay():
    config = RUN["arcee"]()
    config.attention_dropout = 0.5
    model = model_of(config).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    enable(model, ClusterProfile((6, 6, 6)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


def test_a_profile_that_does_not_fit_is_refused_before_anything_runs():
    model = model_of(RUN["arcee"]())
    calls = forwards(model)
    with pytest.raises(ProfileError):
        enable(model, ClusterProfile((6, 6)))
    assert not calls


def test_broken_weights_are_not_taken_for_another_attention():
    model = model_of(RUN["arcee"]())
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    enable(model, ClusterProfile((6, 6, 6)))


def test_a_model_that_needs_other_inputs_is_not_refused():
    model = model_of(RUN["arcee"]())
    forward = model.forward

    def wants_more(*args, image=None, **kwargs):
        if image is None:
            raise ValueError("no image")
        return forward(*args, **kwargs)

    model.forward = wants_more
    enable(model, ClusterProfile((6, 6, 6)))
    assert model(IDS, image=1).logits.shape == (2, 12, 97)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["arcee", "cohere2", "nemotron", "qwen3_moe"])
def test_rounding_is_not_taken_for_another_attention(family, dtype):
    model = model_of(RUN[family]()).to(dtype)
    enable(model, ClusterProfile((6, 6, 6)))
