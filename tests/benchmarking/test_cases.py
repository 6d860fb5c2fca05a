"""What may be asked of a benchmark, and what a model, preset or profile comes to."""

import pytest
import torch

from chai_attention.benchmarking import cases, presets
from chai_attention.benchmarking.cases import AttentionShape, BenchmarkError, Case
from chai_attention.errors import ProfileError
from chai_attention.profile import ClusterProfile
from tiny_models import CONFIGS


def no_config(name):
    raise AssertionError(f"{name} should not be loaded")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("decode:16x8192", Case("decode", 16, 8192)),
        ("prefill:1x32,768", Case("prefill", 1, 32768)),
    ],
)
def test_cases(text, want):
    assert cases.parse_case(text) == want
    assert want.queries == (1 if want.kind == "decode" else want.tokens)


@pytest.mark.parametrize("text", ["16x8192", "decode:0x5", "decode:5", "train:1x2", "decode:1x-2"])
def test_bad_cases(text):
    with pytest.raises(BenchmarkError, match=r"--case is decode:BATCHxTOKENS"):
        cases.parse_case(text)


@pytest.mark.parametrize("text", ["decode:1x2048", "1", "0x5", "1x1", ""])
def test_bad_sizes(text):
    assert cases.parse_size("4x2,048") == (4, 2048)
    with pytest.raises(BenchmarkError, match="BATCHxTOKENS with two tokens"):
        cases.parse_size(text)


def test_clusters():
    assert cases.parse_clusters("16,4,all,4", 32) == (4, 16, 32)
    assert cases.default_clusters(32) == (4, 16, 32)
    assert cases.default_clusters(1) == (1,)
    for text in ("0", "33", "x", "4,", "-1"):
        with pytest.raises(BenchmarkError, match="numbers from 1 to 32"):
            cases.parse_clusters(text, 32)


def test_recent():
    assert cases.parse_recent("32+4") == (32, 4)
    assert cases.parse_recent("8") == (8, 0)
    assert cases.parse_recent("0") == (0, 0)
    for text in ("0+4", "32+", "a", "-3"):
        with pytest.raises(BenchmarkError, match=r"RECENT\+SINKS"):
            cases.parse_recent(text)


def test_cache_dtypes():
    assert (cases.parse_cache_dtype("auto"), cases.parse_cache_dtype("fp8")) == (False, True)
    with pytest.raises(BenchmarkError, match="auto or fp8, not 'int8'"):
        cases.parse_cache_dtype("int8")


def test_dtypes_and_devices():
    assert cases.parse_dtypes("float32,bfloat16,float32") == (torch.float32, torch.bfloat16)
    with pytest.raises(BenchmarkError, match="--dtype is of"):
        cases.parse_dtypes("int8")
    assert cases.resolve_device("cpu") == "cpu"
    with pytest.raises(BenchmarkError, match="not 'tpu'"):
        cases.resolve_device("tpu")


@pytest.mark.parametrize(
    ("name", "layers", "heads", "hidden"),
    [("llama-7b", 32, 32, 4096), ("llama-33b", 60, 52, 6656), ("opt-66b", 64, 72, 9216)],
)
def test_presets(name, layers, heads, hidden):
    config = presets.preset_config(name, 9000)
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, heads)
    assert config.hidden_size == hidden
    assert config.max_position_embeddings == 9000
    shape = presets.resolve_attention(name, None, None, no_config)
    assert shape == AttentionShape(name, heads, heads, 128)


def test_shapes_from_models_and_profiles():
    def load(name):
        return CONFIGS[name]()

    assert presets.resolve_attention(None, None, None, no_config).name == "llama-7b"
    grouped = presets.resolve_attention("llama-grouped", None, None, load)
    assert (grouped.heads, grouped.kv_heads, grouped.head_dim) == (6, 2, 8)
    published = ClusterProfile.published("llama-33b")
    assert presets.resolve_attention(None, "llama-33b", published, no_config).heads == 52
    known = ClusterProfile((2, 3), model={"heads": 6, "kv_heads": 3, "head_dim": 16, "layers": 2})
    shape = presets.resolve_attention(None, "a/mine.json", known, no_config)
    assert shape == AttentionShape("mine.json", 6, 3, 16)
    with pytest.raises(BenchmarkError, match="does not say heads, kv_heads, head_dim"):
        presets.resolve_attention(None, "mine.json", ClusterProfile((2, 3)), no_config)
    with pytest.raises(ProfileError, match="does not fit the model"):
        presets.resolve_attention("llama", "mine.json", known, load)


def test_a_model_needs_a_profile_unless_one_is_published():
    plan = presets.resolve_model("llama-7b", None, None, 100, no_config)
    assert plan.profile == ClusterProfile.published("llama-7b")
    assert plan.profile_name == "published schedule of llama-7b"
    with pytest.raises(BenchmarkError, match="no schedule is published for opt-66b"):
        presets.resolve_model("opt-66b", None, None, 100, no_config)
    with pytest.raises(ProfileError, match="heads is 32 in the profile, 72"):
        presets.resolve_model("opt-66b", "llama-7b", None, 100, no_config)


def test_a_part_of_the_layers():
    plan = presets.resolve_model("llama-7b", None, 4, 100, no_config)
    assert plan.name == "llama-7b, 4 of 32 layers"
    assert plan.config.num_hidden_layers == 4
    assert plan.profile.clusters == (32, 32, 4, 4)  # layers 4, 12, 20 and 28
    with pytest.raises(BenchmarkError, match="--layers 33 is more than the 32"):
        presets.resolve_model("llama-7b", None, 33, 100, no_config)


def test_static_profiles_give_their_memberships():
    rep = ((0, 0, 2), (0, 1, 2), (1, 1, 2))
    static = ClusterProfile((2, 3, 2), membership="static", representatives=rep)
    assert presets.profile_clusters(static) == (2, 3)
    assert presets.profile_representatives(static) == {2: rep[0], 3: rep[1]}
    assert presets.profile_representatives(ClusterProfile((2, 3, 2))) == {}
