"""The cache as `generate` and users treat it: what it holds, and that nothing changes a result."""

import copy
import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers import (
    ClusteredCache,
    StaticClusteredCache,
    enable,
    enabled,
)
from chai_attention.integrations.transformers.buffers import TokenBuffer
from chai_attention.integrations.transformers.layer import ClusteredLayer
from chai_attention.integrations.transformers.recent import LOCAL
from chai_attention.profile import ClusterProfile, sliding_bytes
from chai_attention.runtime.shape import describe
from tiny_models import tiny_model

PROFILE = ClusterProfile(clusters=(2, 6, 3), window=8)
SLIDING_MAPS = ((0, 1, 2, 3, 4, 5), (0, 1, 2, 0, 1, 2), (3, 4, 5, 3, 4, 5))
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def model():
    model = tiny_model("llama")
    enable(model, PROFILE)
    return model


def prompt(length, batch=1, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def step_by_step(model, ids, new):
    """Greedy decoding without any cache."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("length", [1, 3, 7, 8, 9, 50])
def test_generate_equals_decoding_without_cache(model, length):
    ids = prompt(length, batch=2)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, eos_token_id=None)
    assert torch.equal(got, step_by_step(model, ids, 12))


@torch.no_grad()
def test_holds_k_of_representatives_only(model):
    cache = ClusteredCache(model, PROFILE)
    model(prompt(100, batch=3), past_key_values=cache)
    model(prompt(1, batch=3), past_key_values=cache)
    for layer, clusters in zip(cache.layers, PROFILE.clusters, strict=True):
        assert layer.keys.shape == (3, clusters, 101, 8)
        assert layer.values.shape == (3, 6, 101, 8)
    memory = cache.memory()
    held = [t for layer in cache.layers for t in layer.tensors().values()]
    assert memory.total_bytes == sum(t.untyped_storage().nbytes() for t in held)
    room = held[0].shape[2]
    assert memory.key_bytes == 3 * room * 8 * 4 * sum(PROFILE.clusters)
    assert memory.full_key_bytes == 3 * room * 8 * 4 * 18
    assert memory.full_bytes == 2 * memory.full_key_bytes
    assert memory.tokens == 101
    assert memory.sequences == 3


@torch.no_grad()
def test_k_of_dropped_heads_is_held_nowhere(model):
    """Of a long prompt, nothing stays alive anywhere but what the cache reports."""
    profile = ClusterProfile(clusters=(2, 2, 2), window=8)
    enable(model, profile)
    model(prompt(40))  # tables that all calls share are made now
    gc.collect()
    old = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    cache = ClusteredCache(model, profile)
    model(prompt(500), past_key_values=cache)
    gc.collect()
    new = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in old]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}
    assert sum(storages.values()) < cache.memory().total_bytes + 20_000
    assert cache.memory().saved == pytest.approx((6 - 2) / 12, abs=1e-6)


@torch.no_grad()
def test_short_prompt_keeps_all_k_until_its_window_is_full(model):
    cache = ClusteredCache(model, PROFILE)
    model(prompt(5), past_key_values=cache)
    assert cache.layers[0].keys.shape[1] == 6
    for _ in range(3):
        assert cache.layers[0].membership is None
        model(prompt(1), past_key_values=cache)
    assert cache.layers[0].keys.shape[1] == 2
    assert "probe" not in cache.layers[0].tensors()


def test_a_result_does_not_depend_on_the_batch(model):
    """Rows whose windows fill up at different times give what each gives alone."""
    alone = [prompt(length, seed=length) for length in (3, 20, 60)]
    width = max(ids.shape[1] for ids in alone)
    ids = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(alone):
        ids[row, width - one.shape[1] :] = one
        mask[row, width - one.shape[1] :] = 1
    got = model.generate(ids, attention_mask=mask, **GREEDY, eos_token_id=None)
    for row, one in enumerate(alone):
        want = model.generate(one, attention_mask=torch.ones_like(one), **GREEDY, eos_token_id=None)
        assert torch.equal(got[row, width:], want[0, one.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[40], [1, 39], [3, 3, 34], [8, 32], [39, 1], [9] * 4 + [4]])
def test_chunked_prefill_equals_one_call(model, cuts):
    ids = prompt(40, batch=2)
    want = model(ids, use_cache=False).logits
    cache = ClusteredCache(model, PROFILE)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [2, 5, 7, 8, 12, 30])
def test_assisted_decoding_gives_the_same_tokens(model, length):
    """Draft tokens that are taken back leave no trace, around the window's end above all."""
    ids = prompt(length)
    options = {**GREEDY, "max_new_tokens": 30, "eos_token_id": None}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    got = model.generate(
        ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=4, **options
    )
    assert torch.equal(got, want)
    assistant = tiny_model("llama")  # guesses as the model does without clusters: often wrong
    got = model.generate(
        ids, attention_mask=torch.ones_like(ids), assistant_model=assistant, **options
    )
    assert torch.equal(got, want)


def test_beam_search_equals_a_search_that_keeps_no_cache(model):
    ids = prompt(6, batch=2)
    options = {"max_new_tokens": 14, "num_beams": 3, "eos_token_id": None, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    want = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), want)


def test_sampling_is_reproducible(model):
    ids = prompt(10)
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
    options["attention_mask"] = torch.ones_like(ids)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outs.append(model.generate(ids, use_cache=use_cache, **options))
    assert torch.equal(*outs)


@torch.no_grad()
def test_a_second_turn_goes_on_with_the_cache(model):
    cache = ClusteredCache(model, PROFILE)
    ids = prompt(12)
    options = {**GREEDY, "eos_token_id": None, "past_key_values": cache}
    first = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    ids = torch.cat([first, prompt(7, seed=3)], 1)
    second = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(second, step_by_step(model, ids, 12))


@torch.no_grad()
def test_crop(model):
    ids = prompt(60)
    want = model(ids, use_cache=False).logits
    cache = ClusteredCache(model, PROFILE)
    model(torch.cat([ids[:, :50], prompt(9, seed=9)], 1), past_key_values=cache)
    cache.crop(-9)
    assert cache.get_seq_length() == 50
    got = model(ids[:, 50:], past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, 50:], atol=1e-5, rtol=1e-5)
    with pytest.raises(CacheError, match="cannot crop to 5 tokens"):
        cache.crop(-55)
    cache.crop(-60)
    assert cache.get_seq_length() == 0
    got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 30])
def test_batch_select_and_repeat(model, length):
    ids, more = prompt(length, batch=3), prompt(9, batch=3, seed=4)
    want = model(torch.cat([ids, more], 1), use_cache=False).logits[:, length:]
    cache = ClusteredCache(model, PROFILE)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert cache.memory().sequences == 6
    rows = torch.tensor([4, 1])
    cache.batch_select_indices(rows)
    got = model(more[rows // 2], past_key_values=cache).logits
    torch.testing.assert_close(got, want[rows // 2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_empty_dynamic_cache_becomes_a_clustered_one(model):
    cache = DynamicCache(config=model.config)
    model(prompt(20), past_key_values=cache)
    assert isinstance(cache, ClusteredCache)
    assert isinstance(cache.layers[0], ClusteredLayer)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_cache_takes_what_enable_takes(kind, tmp_path):
    model, path = tiny_model("llama"), kind(tmp_path / "profile.json")
    PROFILE.save(path)
    enable(model, path)
    for cache in (ClusteredCache(model, path), StaticClusteredCache(model, path, 20)):
        assert [layer.plan.clusters for layer in cache.layers] == [2, 6, 3]


@torch.no_grad()
@pytest.mark.parametrize("held", [0, 4, 20])
@pytest.mark.parametrize("recent", [0, 3])
def test_no_memory_for_v_does_not_leave_k_of_tokens_that_are_not_there(held, recent, monkeypatch):
    """In the first layer, so that all layers hold equally many tokens; fewer sequences fit then."""
    profile = replace(PROFILE, recent=recent)
    model, ids = tiny_model("llama"), prompt(held + 40, batch=2)
    enable(model, profile)
    cache = ClusteredCache(model, profile)
    if held:
        model(ids[:, :held], past_key_values=cache)
    grow = TokenBuffer._grow

    def full(buffer, new, needed):
        if buffer is cache.layers[0]._values:
            raise torch.OutOfMemoryError("no memory for V")
        grow(buffer, new, needed)

    monkeypatch.setattr(TokenBuffer, "_grow", full)
    with pytest.raises(torch.OutOfMemoryError):
        model(ids[:, held:], past_key_values=cache)
    monkeypatch.undo()
    cache.batch_select_indices(torch.tensor([1]))
    got = model(ids[1:, held:], past_key_values=cache).logits
    want = model(ids[1:], use_cache=False).logits[:, held:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prompt_without_memory_does_not_choose_the_heads_of_the_next_one(model, monkeypatch):
    cache = ClusteredCache(model, PROFILE)

    def full(*_):
        raise torch.OutOfMemoryError("no memory for K")

    monkeypatch.setattr(TokenBuffer, "_grow", full)
    with pytest.raises(torch.OutOfMemoryError):
        model(prompt(40), past_key_values=cache)
    monkeypatch.undo()
    ids = prompt(30, seed=5)
    got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_other_caches_are_refused():
    model = tiny_model("llama")
    filled = DynamicCache(config=model.config)
    model(prompt(20), past_key_values=filled)
    enable(model, PROFILE)
    with pytest.raises(CacheError, match="already holds K of all heads"):
        model(prompt(1), past_key_values=filled)

    class OtherCache(DynamicCache):
        pass

    with pytest.raises(CacheError, match="not OtherCache"):
        model(prompt(4), past_key_values=OtherCache(config=model.config))
    other = ClusteredCache(model, ClusterProfile(clusters=(2, 2, 2), window=8))
    with pytest.raises(CacheError, match="another profile"):
        model(prompt(4), past_key_values=other)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 20])
@pytest.mark.parametrize("kind", [ClusteredCache, StaticClusteredCache])
def test_a_clustered_cache_outside_its_model_is_refused_at_once(kind, tokens):
    """Not at its second forward: the first would see the new tokens only."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    room = {} if kind is ClusteredCache else {"max_tokens": 60}
    cache = kind(model, PROFILE, **room)
    with enabled(model, PROFILE):
        if tokens:
            model(prompt(tokens), past_key_values=cache)
        with pytest.raises(CacheError, match=r"while chai_attention\.enable"):
            plain(prompt(1), past_key_values=cache)
    for other in (model, plain):
        with pytest.raises(CacheError, match=r"while chai_attention\.enable"):
            other(prompt(1), past_key_values=cache)
    with enabled(model, PROFILE):  # and nothing of that is left in it
        got = model(prompt(9, seed=1), past_key_values=cache).logits
        ids = torch.cat([prompt(tokens), prompt(9, seed=1)], 1)
        want = model(ids, use_cache=False).logits[:, tokens:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_of_another_profile_is_refused_after_it_was_enabled(model):
    cache = ClusteredCache(model, PROFILE)
    model(prompt(20), past_key_values=cache)
    enable(model, ClusterProfile(clusters=(2, 2, 2), window=8))
    with pytest.raises(CacheError, match="another profile"):
        model(prompt(1), past_key_values=cache)
    enable(model, PROFILE)
    got = model(prompt(1), past_key_values=cache).logits
    want = model(torch.cat([prompt(20), prompt(1)], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_goes_on_after_a_forward_that_was_refused(model):
    cache = ClusteredCache(model, PROFILE)
    ids = prompt(30)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(CacheError, match="covers 3 tokens"):
        model(ids[:, 20:], past_key_values=cache, attention_mask=torch.tensor([[0, 1, 1]]))
    got = model(ids[:, 20:], past_key_values=cache).logits
    want = model(ids, use_cache=False).logits[:, 20:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_of_other_sequences_is_refused_and_goes_on(model, batch):
    cache = ClusteredCache(model, PROFILE)
    ids = prompt(23, batch=2)
    for part in ids.split([20, 1, 1, 1], 1)[:3]:
        model(part, past_key_values=cache)
    with pytest.raises(CacheError, match="holds 2 sequences, and this forward brings"):
        model(prompt(1, batch), past_key_values=cache)
    got = model(ids[:, 22:], past_key_values=cache).logits
    want = model(ids, use_cache=False).logits[:, 22:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "batch"), [(1, 2), (2, 1)])
def test_a_mask_of_other_sequences_is_refused(model, rows, batch):
    with pytest.raises(CacheError, match="attention_mask is for"):
        model(prompt(20, batch), attention_mask=torch.ones(rows, 20))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 20])
def test_a_forward_that_stopped_midway_is_noticed(model, tokens):
    cache = ClusteredCache(model, PROFILE)
    if tokens:
        model(prompt(tokens), past_key_values=cache)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(prompt(4), past_key_values=cache)
    hook.remove()
    with pytest.raises(CacheError, match="stopped midway"):
        model(prompt(4), past_key_values=cache)
    cache.reset()
    got = model(prompt(9), past_key_values=cache).logits
    want = model(prompt(9), use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sliding_layers_do_not_hide_that_a_cache_was_used_outside_its_model():
    """They come first, and take their tokens before a clustered layer refuses."""
    model = tiny_model("gemma2")
    profile = ClusterProfile((6, 3, 3), window=8)
    cache = ClusteredCache(model, profile)
    with enabled(model, profile):
        model(prompt(20), past_key_values=cache)
    with pytest.raises(CacheError, match=r"while chai_attention\.enable"):
        model(prompt(1), past_key_values=cache)
    with enabled(model, profile), pytest.raises(CacheError, match="stopped midway"):
        model(prompt(1), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo3"])
def test_sliding_layers_are_counted_for_the_tokens_that_they_hold(family):
    """The bytes that are there, against those that a profile promises of a model's shape."""
    model, tokens = tiny_model(family), 201
    shape = describe(model)
    profile = ClusterProfile((6, 3, 3), "static", representatives=SLIDING_MAPS)
    cache = ClusteredCache(model, profile)
    with enabled(model, profile):
        model(prompt(tokens - 1), past_key_values=cache)
        model(prompt(1), past_key_values=cache)  # until then the prompt's memory is held
    slides = cache.layers[0]
    held = slides.keys.untyped_storage().nbytes() + slides.values.untyped_storage().nbytes()
    assert held == sliding_bytes(shape, 4, tokens) == 2 * shape.kv_heads * 8 * shape.head_dim * 4
    full, _ = profile.bytes_per_token(shape, 4)
    memory = cache.memory()
    assert memory.full_bytes == pytest.approx(full * tokens + held, rel=0.08)  # spare room
    assert memory.saved == pytest.approx(profile.saved(shape, tokens), abs=0.005)
    assert memory.saved > 0.2


COST = [[float(abs(head - other)) for other in range(6)] for head in range(6)]
COUNTED = {
    "online": PROFILE,
    "late": ClusterProfile((2, 6, 3), window=5, probe_start=3),
    "blend": ClusterProfile((2, 6, 3), "blend", window=8, blend=1.0, costs=[COST] * 3),
    "static": ClusterProfile((6, 3, 3), "static", window=8, representatives=SLIDING_MAPS),
}
CASES = [
    (kind, replace(profile, recent=recent, sinks=sinks))
    for kind, profile in COUNTED.items()
    for recent, sinks in ((0, 0), (3, 1), (12, 2))
]
# in the second layer no head shares
STREAMS = replace(PROFILE, clusters=(2, 4, 3), streaming=((5,), (4, 5), ()), recent=3, sinks=1)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [100, 3, 1])
@pytest.mark.parametrize(("kind", "profile"), [*CASES, ("streams", STREAMS)])
def test_a_text_shorter_than_its_probe_window_is_not_said_to_save(kind, profile, chunk):
    """The bytes that are there, against those that a profile says."""
    model = tiny_model("llama")
    shape, least = describe(model), profile.recent + profile.sinks
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4
    for tokens in (1, 4, 7, 8, 9, 14, 40):
        cache, ids = ClusteredCache(model, profile), prompt(tokens)
        with enabled(model, profile):
            for begin in range(0, tokens, chunk):
                model(ids[:, begin : begin + chunk], past_key_values=cache)
        waits = tokens < 8 and kind not in ("static", "streams")
        if not waits and tokens < least:
            continue  # the first tokens are among the last ones, and held twice
        held = 0
        for layer in cache.layers:  # without room for more tokens, and queries
            tensors = layer.tensors()
            rings = [tensor for name, tensor in tensors.items() if name in LOCAL]
            held += sum(tensor.nbytes for tensor in (layer.keys, layer.values, *rings))
        assert profile.saved(shape, tokens) == pytest.approx(1 - held / (token * tokens))
        assert (held == token * tokens) == (waits or tokens == least)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 30])
def test_a_copied_cache_goes_its_own_way(model, length):
    """A prompt computed once, copied for each of its continuations."""
    ids = prompt(length)
    first = ClusteredCache(model, PROFILE)
    model(ids, past_key_values=first)
    for seed in (1, 2):
        more = prompt(9, seed=seed)
        got = model(more, past_key_values=copy.deepcopy(first)).logits
        want = model(torch.cat([ids, more], 1), use_cache=False).logits[:, length:]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert first.get_seq_length() == length


@torch.no_grad()
def test_a_refused_crop_removes_nothing(model):
    ids = prompt(60)
    cache = ClusteredCache(model, PROFILE)  # its second layer could go back to any token
    model(ids[:, :40], past_key_values=cache)
    with pytest.raises(CacheError, match="cannot crop to 5 tokens"):
        cache.crop(5)
    assert {layer.get_seq_length() for layer in cache.layers} == {40}
    got = model(ids[:, 40:], past_key_values=cache).logits
    want = model(ids, use_cache=False).logits[:, 40:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 12, 70])
def test_crop_into_the_probe_window_if_it_was_announced(model, length):
    ids = prompt(60, batch=2)
    want = model(ids, use_cache=False).logits
    for keep in (8, 7, 3, 1):
        cache = ClusteredCache(model, PROFILE)
        cache.activate_past_recording()
        model(torch.cat([ids[:, :keep], prompt(length, batch=2, seed=9)], 1), past_key_values=cache)
        assert cache.layers[0].keys.shape[1] == 2  # nothing but the window's K waits
        cache.crop(-length)
        parts = [ids[:, keep : keep + 3], ids[:, keep + 3 :]]
        got = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
        torch.testing.assert_close(got, want[:, keep:], atol=1e-5, rtol=1e-5)
        cache.crop(keep)  # and again, as long as the past is recorded
        got = model(ids[:, keep:], past_key_values=cache).logits
        torch.testing.assert_close(got, want[:, keep:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_reset_starts_over(model):
    cache = ClusteredCache(model, PROFILE)
    model(prompt(20), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory().total_bytes == 0
    ids = prompt(30, seed=8)
    got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)
