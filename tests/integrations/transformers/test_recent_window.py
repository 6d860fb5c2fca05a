"""The cache with an exact recent window: what it holds, and that nothing changes a result."""

import gc
from dataclasses import replace

import pytest
import torch

from chai_attention.errors import CacheError
from chai_attention.integrations.transformers import ClusteredCache, enable
from chai_attention.profile import ClusterProfile
from tiny_models import tiny_model

RECENT, SINKS = 5, 3
GENERATOR = torch.Generator().manual_seed(3)
WINDOW = {
    "recent": RECENT,
    "sinks": SINKS,
    "offsets": torch.randn(3, 6, 6, generator=GENERATOR).tolist(),
}
ONLINE = ClusterProfile(clusters=(2, 6, 3), window=6, probe_start=2, **WINDOW)
STATIC = ClusterProfile(
    clusters=(2, 6, 3),
    membership="static",
    representatives=((0, 0, 4, 4, 4, 0), (0, 1, 2, 3, 4, 5), (3, 1, 1, 3, 3, 5)),
    **WINDOW,
)
BLEND = ClusterProfile(
    clusters=(2, 6, 3),
    membership="blend",
    window=8,
    blend=1.0,
    costs=torch.rand(3, 6, 6, generator=GENERATOR).tolist(),
    **WINDOW,
)
STREAMING = ClusterProfile(
    clusters=(2, 6, 0),
    membership="static",
    representatives=((0, 1, 4, 0, 4, 5), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)),
    streaming=((1, 5), (), (0, 1, 2, 3, 4, 5)),
    **WINDOW,
)
ONLINE_STREAMING = ClusterProfile(
    clusters=(2, 3, 6), window=6, probe_start=2, streaming=((1, 5), (0, 2, 3), ()), **WINDOW
)
PROFILES = {
    "online": ONLINE,
    "static": STATIC,
    "blend": BLEND,
    "streaming": STREAMING,
    "online-streaming": ONLINE_STREAMING,
    "blend-streaming": replace(BLEND, clusters=(2, 6, 2), streaming=((1,), (), (0, 2, 5))),
}
GREEDY = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=PROFILES)
def profile(request):
    return PROFILES[request.param]


@pytest.fixture
def model(profile):
    model = tiny_model("llama")
    enable(model, profile)
    return model


def prompt(length, batch=1, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def step_by_step(model, ids, new):
    """Greedy decoding without any cache."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# ---- what is held


@torch.no_grad()
def test_removed_heads_keep_the_window_and_no_more(model, profile):
    cache = ClusteredCache(model, profile)
    model(prompt(100, batch=2), past_key_values=cache)
    for last in (RECENT, RECENT, RECENT):
        removed = 0
        for index, clusters in enumerate(profile.clusters):
            held, streaming = cache.layers[index].tensors(), len(profile.streaming_heads(index))
            if clusters == 6:
                assert held.keys() == {"key", "value"}
                continue
            assert held["key"].shape[1] == clusters
            assert held["value"].shape[2] == 6 - streaming
            assert held["recent"].shape == (2, 6 - clusters, last, 8)
            assert held["sink"].shape == (2, 6 - clusters, SINKS, 8)
            if streaming:
                assert held["recent value"].shape == (2, streaming, last, 8)
                assert held["sink value"].shape == (2, streaming, SINKS, 8)
            removed += 6 - clusters + streaming
        memory = cache.memory()
        assert memory.recent_bytes == 2 * removed * (last + SINKS) * 8 * 4
        held = [t for layer in cache.layers for t in layer.tensors().values()]
        assert memory.total_bytes == sum(t.untyped_storage().nbytes() for t in held)
        model(prompt(1, batch=2), past_key_values=cache)


@torch.no_grad()
def test_one_removed_head_holds_no_more_than_its_window():
    """Its slices are contiguous, so that only a copy frees what is around them."""
    model = tiny_model("llama")
    rep = ((0, 0, 2, 3, 4, 5),) * 3
    profile = ClusterProfile((5, 5, 5), "static", representatives=rep, **WINDOW)
    enable(model, profile)
    cache = ClusteredCache(model, profile)
    for length in (10, 200):
        model(prompt(length), past_key_values=cache)
    assert cache.memory().recent_bytes == 3 * (RECENT + SINKS) * 8 * 4
    cache.activate_past_recording()
    model(prompt(20), past_key_values=cache)
    assert cache.memory().recent_bytes == 3 * (RECENT + 20 + SINKS) * 8 * 4
    cache.crop(-20)
    assert cache.memory().recent_bytes == 3 * (RECENT + SINKS) * 8 * 4


@torch.no_grad()
def test_k_of_removed_heads_is_held_nowhere_else(model, profile):
    step, ids = prompt(1), prompt(500)
    warm = ClusteredCache(model, profile)
    for tokens in (ids, step):  # tables that all calls share are made now
        model(tokens, past_key_values=warm)
    del warm
    gc.collect()
    old = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    cache = ClusteredCache(model, profile)
    for tokens in (ids, step):
        model(tokens, past_key_values=cache)
    gc.collect()
    new = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in old]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}
    assert sum(storages.values()) < cache.memory().total_bytes + 20_000


@torch.no_grad()
def test_a_probe_keeps_all_k_and_the_window_is_cut_from_it():
    model = tiny_model("llama")
    enable(model, ONLINE)
    cache = ClusteredCache(model, ONLINE)
    model(prompt(6), past_key_values=cache)
    for _ in range(2):
        assert cache.layers[0].membership is None
        assert cache.memory().recent_bytes == 0
        model(prompt(1), past_key_values=cache)
    assert cache.layers[0].keys.shape[1] == 2
    assert cache.memory().recent_bytes == 7 * (RECENT + SINKS) * 8 * 4


@torch.no_grad()
def test_fewer_tokens_than_the_window_and_sinks():
    model = tiny_model("llama")
    enable(model, STATIC)
    cache = ClusteredCache(model, STATIC)
    ids = prompt(7)
    want = model(ids, use_cache=False).logits
    for token in range(7):
        close(model(ids[:, token : token + 1], past_key_values=cache).logits[0, 0], want[0, token])
        held = min(token + 1, RECENT) + min(token + 1, SINKS)
        assert cache.memory().recent_bytes == 7 * held * 8 * 4


@torch.no_grad()
def test_reset_forgets_the_window(model, profile):
    cache = ClusteredCache(model, profile)
    model(prompt(50), past_key_values=cache)
    cache.reset()
    assert cache.memory().total_bytes == 0
    ids = prompt(30, seed=8)
    close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


# ---- results


@pytest.mark.parametrize("length", [1, 4, 9, 40])
def test_generate_equals_decoding_without_cache(model, length):
    ids = prompt(length, batch=2)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(got, step_by_step(model, ids, 14))


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1, 39], [3, 3, 34], [38, 1, 1], [9] * 4 + [4]])
def test_chunked_prefill_equals_one_call(model, profile, cuts):
    ids = prompt(40, batch=2)
    want = model(ids, use_cache=False).logits
    cache = ClusteredCache(model, profile)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(cuts, dim=1)]
    close(torch.cat(parts, 1), want)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama-grouped"])
@pytest.mark.parametrize(("recent", "sinks"), [(1, 0), (4, 0), (1, 2), (33, 4), (100, 0)])
def test_windows_of_any_size(family, recent, sinks):
    model = tiny_model(family)
    rep = ((0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 4, 4), (0, 0, 2, 2, 0, 2))
    profile = ClusterProfile((1, 2, 2), "static", representatives=rep, recent=recent, sinks=sinks)
    enable(model, profile)
    ids = prompt(60, batch=2)
    want = model(ids, use_cache=False).logits
    cache = ClusteredCache(model, profile)
    parts = [
        model(part, past_key_values=cache).logits for part in ids.split([3, 1, 40, 14, 1, 1], dim=1)
    ]
    close(torch.cat(parts, 1), want)
    assert cache.layers[0].tensors()["recent"].shape[2] == min(recent, 60)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_result_does_not_depend_on_the_batch(model, side):
    """Rows whose sinks and windows fill up at different times; padding between tokens as well."""
    alone = [prompt(length, seed=length) for length in (1, 2, 12, 40)]
    width = 40
    ids = torch.zeros(4, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(alone):
        start = width - one.shape[1] if side == "left" else 0
        ids[row, start : start + one.shape[1]] = one
        mask[row, start : start + one.shape[1]] = 1
    got = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, one in enumerate(alone):
        if side == "left":
            want = model.generate(one, attention_mask=torch.ones_like(one), **GREEDY)
            assert torch.equal(got[row, width:], want[0, one.shape[1] :])
        else:
            want = model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **GREEDY)
            assert torch.equal(got[row], want[0])


@torch.no_grad()
def test_padding_between_tokens_counts_as_distance():
    """Steps after a right-padded prompt, with and without a cache."""
    model = tiny_model("llama")
    enable(model, STATIC)
    ids = prompt(24, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 2:16] = 0  # the third real token, a sink, comes with the fifth step
    want = model(ids, attention_mask=mask, use_cache=False).logits
    cache = ClusteredCache(model, STATIC)
    parts = []
    for start, stop in [(0, 12), *((t, t + 1) for t in range(12, 24))]:
        span = slice(start, stop)
        parts.append(
            model(ids[:, span], attention_mask=mask[:, :stop], past_key_values=cache).logits
        )
    close(torch.cat(parts, 1)[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("length", [2, 7, 30])
def test_assisted_decoding_gives_the_same_tokens(model, length):
    """Draft tokens that are taken back leave no trace in the window."""
    ids = prompt(length)
    options = {**GREEDY, "max_new_tokens": 30, "attention_mask": torch.ones_like(ids)}
    want = step_by_step(model, ids, 30)
    assert torch.equal(model.generate(ids, **options), want)
    got = model.generate(ids, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(got, want)
    assistant = tiny_model("llama")  # guesses as the model does without clusters: often wrong
    got = model.generate(ids, assistant_model=assistant, **options)
    assert torch.equal(got, want)


def test_beam_search_equals_a_search_that_keeps_no_cache(model):
    ids = prompt(6, batch=2)
    options = {**GREEDY, "num_beams": 3, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), want)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 30])
def test_batch_select_and_repeat(model, profile, length):
    ids, more = prompt(length, batch=3), prompt(9, batch=3, seed=4)
    want = model(torch.cat([ids, more], 1), use_cache=False).logits[:, length:]
    cache = ClusteredCache(model, profile)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([4, 1])
    cache.batch_select_indices(rows)
    close(model(more[rows // 2], past_key_values=cache).logits, want[rows // 2])


# ---- crop


@torch.no_grad()
@pytest.mark.parametrize("removed", [1, 9, 32, 90])
def test_crop_after_several_tokens(model, profile, removed):
    ids = prompt(60)
    want = model(ids, use_cache=False).logits
    cache = ClusteredCache(model, profile)
    cache.activate_past_recording()
    drafts = prompt(removed, seed=9)
    model(torch.cat([ids[:, :45], drafts], 1), past_key_values=cache)
    cache.crop(-removed)
    close(model(ids[:, 45:50], past_key_values=cache).logits, want[:, 45:50])
    cache.crop(48)
    close(model(ids[:, 48:], past_key_values=cache).logits, want[:, 48:])


@torch.no_grad()
def test_crop_beyond_the_window(model, profile):
    ids = prompt(60)
    want = model(ids, use_cache=False).logits
    cache = ClusteredCache(model, profile)
    model(ids[:, :59], past_key_values=cache)
    with pytest.raises(CacheError, match="cannot crop to 20 tokens: of 59 the last 5 hold"):
        cache.crop(20)
    model(prompt(1, seed=5), past_key_values=cache)
    cache.crop(-1)  # the new token's own place: its w - 1 predecessors are there
    with pytest.raises(CacheError, match="activate_past_recording"):
        cache.crop(-1)
    close(model(ids[:, 59:], past_key_values=cache).logits, want[:, 59:])
    cache.crop(-60)
    close(model(ids, past_key_values=cache).logits, want)


@torch.no_grad()
def test_crop_into_the_sinks():
    model = tiny_model("llama")
    enable(model, STATIC)
    ids = prompt(30)
    want = model(ids, use_cache=False).logits
    cache = ClusteredCache(model, STATIC)
    cache.activate_past_recording()
    model(torch.cat([ids[:, :1], prompt(9, seed=9)], 1), past_key_values=cache)
    cache.crop(1)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((1, 2), (2, 30))]
    close(torch.cat(parts, 1), want[:, 1:])


@torch.no_grad()
def test_crop_is_free_where_all_k_is_kept():
    """Two clusters of heads of different K/V heads: nothing is removed, so nothing is missing."""
    model = tiny_model("llama-grouped")
    rep = ((0, 0, 0, 3, 3, 3),) * 3
    profile = ClusterProfile((2, 2, 2), "static", representatives=rep, **WINDOW)
    enable(model, profile)
    ids = prompt(40)
    want = model(ids, use_cache=False).logits
    cache = ClusteredCache(model, profile)
    model(ids, past_key_values=cache)
    cache.crop(3)
    assert cache.memory().recent_bytes == 0
    close(model(ids[:, 3:], past_key_values=cache).logits, want[:, 3:])
