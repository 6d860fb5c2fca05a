"""Tokens that are taken back leave no trace, however many: enabled targets, drafts, and both."""

import string

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers import ClusteredCache, StaticClusteredCache, enable
from chai_attention.profile import ClusterProfile
from tiny_models import CONFIGS, tiny_model
from tiny_tokenizer import SPECIAL, tiny_tokenizer

GENERATOR = torch.Generator().manual_seed(3)
REP = ((0, 0, 4, 4, 4, 0), (0, 1, 2, 3, 4, 5), (3, 1, 1, 3, 3, 5))
WINDOW = {"recent": 5, "sinks": 3}
WINDOW["offsets"] = torch.randn(3, 6, 6, generator=GENERATOR).tolist()
STATIC = {"membership": "static", "representatives": REP}
ONLINE = {"window": 6, "probe_start": 2}
PROFILES = {
    "static": ClusterProfile((2, 6, 3), **STATIC),
    "static-recent": ClusterProfile((2, 6, 3), **STATIC, **WINDOW),
    "online": ClusterProfile((2, 6, 3), **ONLINE),
    "online-recent": ClusterProfile((2, 6, 3), **ONLINE, **WINDOW),
    "every-head": ClusterProfile((6, 6, 6), window=6, recent=5, sinks=3),
}
GREEDY = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=PROFILES)
def profile(request):
    return PROFILES[request.param]


def prompt(length, seed=0):
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def repeating(length):
    """A prompt that prompt lookup finds many tokens in, most of them wrong."""
    return prompt(9).repeat(1, length // 9 + 1)[:, :length]


def tokens(model, ids, **options):
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, **{**GREEDY, **options})


def assistant(count):
    """A model that guesses ``count`` tokens at a time, often wrong."""
    model = tiny_model("llama")
    model.generation_config.num_assistant_tokens = count
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


@pytest.mark.parametrize("length", [2, 80])
def test_prompt_lookup(profile, length):
    model = tiny_model("llama")
    enable(model, profile)
    ids = repeating(length)
    want = tokens(model, ids)
    assert torch.equal(tokens(model, ids, prompt_lookup_num_tokens=64), want)
    cache = DynamicCache()  # of the caller's, made without a config
    got = tokens(model, ids, prompt_lookup_num_tokens=64, past_key_values=cache)
    assert torch.equal(got, want)
    assert isinstance(cache, ClusteredCache)


@pytest.mark.parametrize(("length", "count"), [(3, 45), (30, 5)])
@pytest.mark.parametrize("who", ["target", "draft", "both"])
def test_assistant_models(profile, who, length, count):
    model, draft = tiny_model("llama"), assistant(count)
    if who != "draft":
        enable(model, profile)
    if who != "target":
        enable(draft, profile)
    ids = prompt(length)
    want = tokens(model, ids)
    assert torch.equal(tokens(model, ids, assistant_model=draft), want)


def tokenizer_of_pairs():
    """Two characters are a token, so that new characters change tokens that were there."""
    one = string.ascii_letters + string.digits + " \n.,;:!?'\"()-/=@"
    known = [*SPECIAL, *one, *(a + b for a in one for b in one)]
    backend = Tokenizer(WordLevel({text: i for i, text in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]{1,2}"), "isolated")
    backend.decoder = Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("name", ["static-recent", "online-recent"])
def test_an_enabled_draft_with_another_tokenizer(name):
    """It is taken back to where texts differ: before the tokens of its last round."""
    model, profile, pairs = tiny_model("llama"), PROFILES[name], tokenizer_of_pairs()
    config = CONFIGS["llama"]()
    config.vocab_size, config.initializer_range = len(pairs), 0.2
    torch.manual_seed(1)
    draft = AutoModelForCausalLM.from_config(config).eval()
    enable(model, profile)
    enable(draft, profile)
    tokenizer = tiny_tokenizer()
    ids = tokenizer("hello there, what a day " * 2, return_tensors="pt").input_ids
    want = tokens(model, ids, max_new_tokens=40)
    got = tokens(
        model, ids, max_new_tokens=40, assistant_model=draft, tokenizer=tokenizer,
        assistant_tokenizer=pairs,
    )  # fmt: skip
    assert torch.equal(got, want)


def test_drafts_of_the_models_own_first_layers():
    model = tiny_model("llama")
    enable(model, PROFILES["online-recent"])
    ids = prompt(12)
    assert torch.equal(tokens(model, ids, assistant_early_exit=2), tokens(model, ids))


def test_a_family_with_sliding_windows():
    model, draft = tiny_model("gemma2"), tiny_model("gemma2")
    profile = ClusterProfile((6, 3, 3), window=6, recent=5, sinks=2)
    enable(model, profile)
    enable(draft, profile)
    for ids in (prompt(4), repeating(40)):
        want = tokens(model, ids)
        assert torch.equal(tokens(model, ids, prompt_lookup_num_tokens=40), want)
        assert torch.equal(tokens(model, ids, assistant_model=draft), want)


@torch.no_grad()
def test_k_of_removed_heads_is_freed_as_soon_as_a_crop_has_told_what_stays():
    model = tiny_model("llama")
    profile = PROFILES["static-recent"]
    enable(model, profile)
    cache = ClusteredCache(model, profile)
    cache.activate_past_recording()
    model(prompt(400), past_key_values=cache)
    assert cache.layers[0].tensors()["recent"].shape[2] == 400
    cache.crop(-60)
    assert cache.layers[0].tensors()["recent"].shape[2] == 5
    for _ in range(3):  # a draft model's own steps
        model(prompt(1), past_key_values=cache)
    assert cache.layers[0].tensors()["recent"].shape[2] == 8
    for layer in cache.layers:
        layer.record_past = False  # as transformers tells
    model(prompt(1), past_key_values=cache)
    assert cache.layers[0].tensors()["recent"].shape[2] == 5


@pytest.mark.parametrize("length", [3, 30])
def test_a_static_cache_goes_back_into_its_probe_window(length):
    model, profile = tiny_model("llama"), PROFILES["online"]
    enable(model, profile)
    ids = repeating(length)
    want = tokens(model, ids)
    cache = StaticClusteredCache(model, profile, 200)
    got = tokens(model, ids, past_key_values=cache, prompt_lookup_num_tokens=64)
    assert torch.equal(got, want)


def test_a_static_cache_with_a_window_is_refused_before_the_first_token():
    model, profile = tiny_model("llama"), PROFILES["static-recent"]
    enable(model, profile)
    cache = StaticClusteredCache(model, profile, 200)
    with pytest.raises(CacheError, match="use ClusteredCache for assisted decoding"):
        tokens(model, prompt(9), past_key_values=cache, prompt_lookup_num_tokens=4)
    assert cache.get_seq_length() == 0
