"""The static cache gives what the growing one gives, in memory that never changes."""

import copy
import gc

import pytest
import torch
from transformers import StaticCache

from chai_attention.errors import CacheError, UnsupportedModelError
from chai_attention.integrations.transformers import (
    ClusteredCache,
    DecodeGraph,
    StaticClusteredCache,
    disable,
    enable,
)
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from tiny_models import CONFIGS, tiny_model

GENERATOR = torch.Generator().manual_seed(3)
RECENT, SINKS, ROOM = 5, 3, 80
WINDOW = {
    "recent": RECENT,
    "sinks": SINKS,
    "offsets": torch.randn(3, 6, 6, generator=GENERATOR).tolist(),
}
REP = ((0, 0, 4, 4, 4, 0), (0, 1, 2, 3, 4, 5), (3, 1, 1, 3, 3, 5))
COSTS = torch.rand(3, 6, 6, generator=GENERATOR).tolist()
KINDS = {
    "static": {"membership": "static", "representatives": REP},
    "online": {"window": 6, "probe_start": 2},
    "blend": {"membership": "blend", "window": 8, "blend": 1.0, "costs": COSTS},
    "k-bytes": {"window": 6, "target": "k-bytes"},
}
STREAMING = {
    "static-streaming": {
        "membership": "static",
        "clusters": (2, 0, 1),
        "representatives": ((0, 0, 4, 4, 4, 5), (0, 1, 2, 3, 4, 5), (3, 1, 2, 3, 3, 5)),
        "streaming": ((5,), (0, 1, 2, 3, 4, 5), (1, 2, 5)),
    },
    "online-streaming": {
        "clusters": (2, 3, 1), "window": 6, "probe_start": 2,
        "streaming": ((3, 4, 5), (0, 1, 2), (0, 1, 2)),
    },
}  # fmt: skip
KINDS |= STREAMING
CASES = [
    pytest.param(family, kind, window, id=f"{family}-{kind}{'-recent' if window else ''}")
    for family, kinds in (
        ("llama", ("static", "online", "blend", *STREAMING)),
        ("llama-grouped", KINDS),
    )
    for kind in kinds
    for window in (({}, WINDOW) if kind not in STREAMING else (WINDOW,))
]
GREEDY = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}


def made(family, kind, window):
    model = tiny_model(family)
    clusters = (3, 6, 3) if kind == "k-bytes" else (2, 6, 3)
    profile = ClusterProfile(**{"clusters": clusters, **KINDS[kind], **window})
    enable(model, profile)
    return model, profile


def prompt(length, batch=1, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths):
    """Left-padded prompts: ids, mask."""
    width = max(lengths)
    ids = prompt(width, batch=len(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    return ids, mask


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def held(cache):
    """Address of every tensor of the cache."""
    tensors = [t for layer in cache.layers for t in layer.tensors().values()]
    return [t.data_ptr() for t in (*tensors, *cache.tokens.tensors())]


@torch.no_grad()
def logits_of(model, cache, ids, mask, cuts):
    """Logits of real tokens, prompt and steps cut at will."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    parts, stop = [], 0
    for count in cuts:
        start, stop = stop, stop + count
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
        )
        parts.append(out.logits)
    return torch.cat(parts, 1)[mask[:, :stop].bool()]


# ---- results


@pytest.mark.parametrize("cuts", [[70, 1, 1, 1], [40, 30, 1, 1], [3, 2, *[1] * 20, 9]], ids=str)
@pytest.mark.parametrize(("family", "kind", "window"), CASES)
def test_logits_equal_those_of_the_growing_cache(family, kind, window, cuts):
    model, profile = made(family, kind, window)
    ids = prompt(sum(cuts), batch=2)
    mask = torch.ones_like(ids)
    want = logits_of(model, ClusteredCache(model, profile), ids, mask, cuts)
    got = logits_of(model, StaticClusteredCache(model, profile, ROOM), ids, mask, cuts)
    close(got, want)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_has_the_logits_of_the_growing_cache(family):
    """Longer than a sliding window of 8 tokens, which slides in steps of one and of many."""
    model = tiny_model(family)
    clusters = tuple(3 if free else 6 for free in describe(model).clusterable)
    profile = ClusterProfile(clusters, window=6, recent=RECENT, sinks=SINKS)
    enable(model, profile)
    ids = prompt(40, batch=2)
    mask, cuts = torch.ones_like(ids), [30, 1, 1, 8]
    want = logits_of(model, ClusteredCache(model, profile), ids, mask, cuts)
    close(logits_of(model, StaticClusteredCache(model, profile, ROOM), ids, mask, cuts), want)


@pytest.mark.parametrize("cuts", [[60, 1, 1, 8], [20, 40, 1, 1, 1]], ids=str)
@pytest.mark.parametrize(("family", "kind", "window"), CASES)
def test_left_padding(family, kind, window, cuts):
    model, profile = made(family, kind, window)
    ids, mask = padded((70, 12, 1, 33))
    want = logits_of(model, ClusteredCache(model, profile), ids, mask, cuts)
    got = logits_of(model, StaticClusteredCache(model, profile, ROOM), ids, mask, cuts)
    close(got, want)


@torch.no_grad()
def test_right_padding_whose_sinks_come_with_later_steps():
    model, profile = made("llama", "static", WINDOW)
    ids = prompt(30, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 2:16] = 0
    cuts = [12, *[1] * 18]
    want = logits_of(model, ClusteredCache(model, profile), ids, mask, cuts)
    close(logits_of(model, StaticClusteredCache(model, profile, 30), ids, mask, cuts), want)


@torch.no_grad()
@pytest.mark.parametrize(("recent", "sinks"), [(1, 0), (4, 0), (1, 2), (33, 4), (100, 0)])
def test_windows_of_any_size(recent, sinks):
    model = tiny_model("llama-grouped")
    rep = ((0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 4, 4), (0, 0, 2, 2, 0, 2))
    profile = ClusterProfile((1, 2, 2), "static", representatives=rep, recent=recent, sinks=sinks)
    enable(model, profile)
    ids = prompt(60, batch=2)
    cache = StaticClusteredCache(model, profile, 60)
    cuts = ids.split([1, 2, 40, 15, 1, 1], 1)
    parts = [model(part, past_key_values=cache).logits for part in cuts]
    close(torch.cat(parts, 1), model(ids, use_cache=False).logits)


@pytest.mark.parametrize(("family", "kind", "window"), CASES)
def test_generate(family, kind, window):
    """A cache of one's own, one that generate makes, and a second request in the same memory."""
    model, profile = made(family, kind, window)
    ids, mask = padded((40, 9, 31))
    options = {"attention_mask": mask, **GREEDY}
    want = model.generate(ids, **options)
    cache = StaticClusteredCache(model, profile, ROOM)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    out = model.generate(
        ids, cache_implementation="static", return_dict_in_generate=True, **options
    )
    assert torch.equal(out.sequences, want)
    assert isinstance(out.past_key_values, StaticClusteredCache)
    assert out.past_key_values.tokens.capacity == 53

    before = held(cache)
    cache.reset()
    other = prompt(50, batch=3, seed=5)
    options["attention_mask"] = torch.ones_like(other)
    want = model.generate(other, **options)
    assert torch.equal(model.generate(other, past_key_values=cache, **options), want)
    assert held(cache) == before


def test_families_with_masks_of_their_own():
    """Positions from the mask, a mask per kind of layer, sliding layers, softcaps."""
    for family in ("opt", "qwen2", "gemma2", "gpt2"):
        model = tiny_model(family)
        grouped = family in ("qwen2", "gemma2")
        profile = ClusterProfile((6, 3, 3) if grouped else (2, 6, 3), window=8)
        enable(model, profile)
        ids, mask = padded((40, 12))
        want = model.generate(ids, attention_mask=mask, **GREEDY)
        for options in (
            {"cache_implementation": "static"},
            {"past_key_values": StaticClusteredCache(model, profile, 60)},
        ):
            got = model.generate(ids, attention_mask=mask, **GREEDY, **options)
            assert torch.equal(got, want), family


def test_prefill_by_chunks_of_generate():
    model, _ = made("llama", "online", WINDOW)
    ids = prompt(41, batch=2)
    options = {"attention_mask": torch.ones_like(ids), **GREEDY}
    want = model.generate(ids, **options)
    got = model.generate(ids, cache_implementation="static", prefill_chunk_size=16, **options)
    assert torch.equal(got, want)


def test_beam_search():
    for kind in ("static", "online"):
        model, profile = made("llama", kind, WINDOW)
        ids, mask = padded((30, 11))
        options = {**GREEDY, "num_beams": 3, "attention_mask": mask}
        want = model.generate(ids, use_cache=False, **options)
        cache = StaticClusteredCache(model, profile, ROOM, batch_size=6)
        before = held(cache)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
        assert held(cache)[: len(before)] == before


# ---- memory


def formula(clusters, batch, room, window, groups=6, dim=8, size=4):
    """Bytes of K and V, and of the recent window."""
    kept = [min(k, groups) for k in clusters]
    pairs = sum(batch * room * (k + groups) * dim * size for k in kept)
    local = sum(batch * (groups - k) * (RECENT + SINKS) * dim * size for k in kept)
    return pairs, local if window else 0


@torch.no_grad()
@pytest.mark.parametrize("window", [{}, WINDOW], ids=["", "recent"])
@pytest.mark.parametrize("kind", ["static", "online"])
def test_bytes_are_those_of_the_formula(kind, window):
    model, profile = made("llama", kind, window)
    cache = StaticClusteredCache(model, profile, ROOM, batch_size=3)
    pairs, local = formula((2, 6, 3), 3, ROOM, window)
    for _ in range(2):
        memory = cache.memory()
        assert memory.key_bytes + memory.value_bytes == pairs
        assert memory.recent_bytes == local
        assert memory.probe_bytes == 0
        assert memory.full_bytes == 3 * ROOM * 2 * 18 * 8 * 4
        tensors = [t for layer in cache.layers for t in layer.tensors().values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert sum(storages.values()) == pairs + local
        assert memory.total_bytes == pairs + local + memory.table_bytes
        assert memory.table_bytes < 200
        cache.reset()
        model(prompt(50, batch=3), past_key_values=cache)
        model(prompt(1, batch=3), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama-grouped"])
@pytest.mark.parametrize("kind", STREAMING)
@pytest.mark.parametrize("kind_of_cache", [ClusteredCache, StaticClusteredCache])
def test_streaming_heads_hold_their_local_tokens_and_no_more(family, kind, kind_of_cache):
    model, profile = made(family, kind, WINDOW)
    shape = describe(model)
    room = () if kind_of_cache is ClusteredCache else (ROOM,)
    cache = kind_of_cache(model, profile, *room)
    model(prompt(ROOM - 1, batch=2), past_key_values=cache)
    model(prompt(1, batch=2), past_key_values=cache)
    held = [layer.tensors() for layer in cache.layers]
    local = {"recent", "sink", "recent value", "sink value"}
    rings = sum(x[name].untyped_storage().nbytes() for x in held for name in local & x.keys())
    assert rings == 2 * profile.window_bytes(shape, 4)
    memory = cache.memory()
    assert memory.recent_bytes == rings
    far = sum(
        x[name].numel() // x[name].shape[-1] // x[name].shape[0] * 8 * 4
        for x in held for name in ("key", "value")
    )  # fmt: skip
    full, kept = profile.bytes_per_token(shape, 4)
    spare = max(x.shape[2] for x in (held[0]["key"],)) - ROOM  # of a cache that grows
    assert far == kept * (ROOM + spare)
    assert memory.full_bytes == pytest.approx(2 * full * ROOM, rel=0.3)
    assert memory.key_bytes + memory.value_bytes == 2 * far


@torch.no_grad()
def test_k_and_v_are_held_nowhere_else():
    model, profile = made("llama", "online", WINDOW)
    ids, step = prompt(400), prompt(1)
    warm = StaticClusteredCache(model, profile, 500)
    for tokens in (ids, step):  # tables that all calls share are made now
        model(tokens, past_key_values=warm)
    del warm
    gc.collect()
    old = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    cache = StaticClusteredCache(model, profile, 500)
    for tokens in (ids, step):
        model(tokens, past_key_values=cache)
    gc.collect()
    new = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in old]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}
    assert sum(storages.values()) < cache.memory().total_bytes + 20_000


@torch.no_grad()
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(("family", "kind", "window"), CASES)
def test_steps_change_no_memory_and_no_shape(family, kind, window, padding, monkeypatch):
    """Every op of a layer sees the same shapes in every step, and writes to the same memory."""
    model, profile = made(family, kind, window)
    cache = StaticClusteredCache(model, profile, ROOM)
    ids, mask = padded((45, 20)) if padding else (prompt(45, batch=2), None)
    model(ids, attention_mask=mask, past_key_values=cache)
    step = prompt(1, batch=2)
    seen = []
    from chai_attention.integrations.transformers import static_layer

    for name in ("attention", "decode_recent", "write_dense"):
        original = getattr(static_layer, name)

        def watched(*args, original=original, **kwargs):
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            seen.append([(tuple(x.shape), x.stride()) for x in tensors])
            return original(*args, **kwargs)

        monkeypatch.setattr(static_layer, name, watched)
    rounds, addresses = [], []
    for _ in range(6):
        seen.clear()
        model(step, position_ids=torch.full((2, 1), 30), past_key_values=cache)
        rounds.append(list(seen))
        addresses.append(held(cache))
    assert all(one == rounds[0] for one in rounds)
    assert all(one == addresses[0] for one in addresses)


@torch.no_grad()
def test_steps_with_a_mask_do_not_read_it():
    """A tensor that cannot be read on the host stands for the device's."""

    class Unreadable(torch.Tensor):
        def __bool__(self):
            raise AssertionError("a step looked at the mask")

        def tolist(self):
            raise AssertionError("a step looked at the mask")

        item = tolist

    model, profile = made("llama", "static", {})
    cache = StaticClusteredCache(model, profile, ROOM)
    ids, mask = padded((20, 7))
    model(ids, attention_mask=mask, past_key_values=cache)
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    cache.tokens.offer(longer.as_subclass(Unreadable))
    cache.tokens.advance(1)
    assert torch.equal(cache.tokens.valid[:, :21], longer.bool())


# ---- going back


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "online"])
def test_crop(kind):
    model, profile = made("llama", kind, {})
    ids = prompt(60, batch=2)
    want = model(ids, use_cache=False).logits
    cache = StaticClusteredCache(model, profile, ROOM)
    model(torch.cat([ids[:, :50], prompt(9, batch=2, seed=9)], 1), past_key_values=cache)
    cache.crop(-9)
    assert cache.get_seq_length() == 50
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((50, 51), (51, 60))]
    close(torch.cat(parts, 1), want[:, 50:])
    if kind == "online":
        with pytest.raises(CacheError, match="cannot crop to 5 tokens"):
            cache.crop(5)
    cache.crop(-60)
    assert cache.get_seq_length() == 0
    close(model(ids, past_key_values=cache).logits, want)


@torch.no_grad()
def test_crop_with_a_window_only_as_far_as_the_ring_goes():
    model, profile = made("llama", "static", WINDOW)
    ids = prompt(40)
    want = model(ids, use_cache=False).logits
    cache = StaticClusteredCache(model, profile, ROOM)
    model(torch.cat([ids[:, :39], prompt(1, seed=9)], 1), past_key_values=cache)
    cache.crop(-1)
    close(model(ids[:, 39:], past_key_values=cache).logits, want[:, 39:])
    with pytest.raises(CacheError, match="assisted decoding"):
        cache.crop(-2)
    assert cache.get_seq_length() == 40
    cache.reset()  # and freely while the ring holds all, into the sinks too
    model(torch.cat([ids[:, :1], prompt(3, seed=9)], 1), past_key_values=cache)
    cache.crop(1)
    close(model(ids[:, 1:], past_key_values=cache).logits, want[:, 1:])


@pytest.mark.parametrize("length", [3, 7, 30])
def test_assisted_decoding(length):
    model, profile = made("llama", "online", {})
    ids = prompt(length)
    options = {**GREEDY, "max_new_tokens": 30, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, **options)
    cache = StaticClusteredCache(model, profile, ROOM)
    got = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_prompt_shorter_than_the_probe_window_moves_in_when_it_is_full():
    model, profile = made("llama", "online", WINDOW)
    cache = StaticClusteredCache(model, profile, ROOM)
    model(prompt(5, batch=2), past_key_values=cache)
    assert not cache.is_ready
    assert cache.memory().probe_bytes > 0
    for _ in range(3):
        model(prompt(1, batch=2), past_key_values=cache)
    assert cache.is_ready
    assert cache.memory().probe_bytes == 0


# ---- refused


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    model, profile = made("llama", "static", WINDOW)
    cache = StaticClusteredCache(model, profile, 10)
    with pytest.raises(CacheError, match="room for 10 tokens"):
        model(prompt(11), past_key_values=cache)
    want = model(prompt(10), use_cache=False).logits
    close(model(prompt(10), past_key_values=cache).logits, want)
    with pytest.raises(CacheError, match="holds 10 and was given 1 more"):
        model(prompt(1), past_key_values=cache)
    cache.crop(9)
    with pytest.raises(CacheError, match="covers 2 tokens"):
        model(prompt(1), attention_mask=torch.ones(1, 2), past_key_values=cache)
    cache.reset()
    with pytest.raises(CacheError, match="holds 1 sequences, not 2"):
        model(prompt(3, batch=2), past_key_values=cache)
    model(prompt(3), past_key_values=cache)
    with pytest.raises(CacheError, match="cannot repeat"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(CacheError, match="no more and no fewer"):
        cache.batch_select_indices(torch.tensor([0, 0]))
    with pytest.raises(CacheError, match="room for a token"):
        StaticClusteredCache(model, profile, 0)
    with pytest.raises(CacheError, match="a config is not enough"):
        StaticClusteredCache(model.config, profile, 10, batch_size=1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_static_cache_cannot_be_repeated_once_it_holds_tokens(family):
    """Said by an error of ours in models with sliding windows, too, and not before."""
    model = tiny_model(family)
    profile = ClusterProfile((6, 3, 3), window=4)
    enable(model, profile)
    cache = StaticClusteredCache(model, profile, ROOM)
    cache.batch_repeat_interleave(3)  # nothing is there, as with other caches
    model(prompt(9, batch=3), past_key_values=cache)
    cache.batch_repeat_interleave(1)
    with pytest.raises(CacheError, match="cannot repeat its 3 sequences"):
        cache.batch_repeat_interleave(2)


@torch.no_grad()
def test_other_caches_and_profiles_are_refused():
    model = tiny_model("llama")
    filled = StaticCache(config=model.config, max_cache_len=32)
    model(prompt(4), past_key_values=filled)
    profile = ClusterProfile(clusters=(2, 6, 3), window=4)
    enable(model, profile)
    with pytest.raises(CacheError, match="already holds K of all heads"):
        model(prompt(4), past_key_values=filled)
    other = StaticClusteredCache(model, ClusterProfile(clusters=(2, 2, 2), window=4), 32)
    with pytest.raises(CacheError, match="another profile"):
        model(prompt(4), past_key_values=other)


@torch.no_grad()
def test_a_forward_that_stopped_midway_is_noticed():
    model, profile = made("llama", "static", {})
    cache = StaticClusteredCache(model, profile, ROOM)
    model(prompt(4), past_key_values=cache)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(prompt(4), past_key_values=cache)
    hook.remove()
    with pytest.raises(CacheError, match="stopped midway"):
        model(prompt(4), past_key_values=cache)
    cache.reset()
    close(
        model(prompt(4), past_key_values=cache).logits,
        model(prompt(4), use_cache=False).logits,
    )


def test_graphs_need_cuda_and_compile_options_are_refused():
    model, profile = made("llama", "static", {})
    with pytest.raises(UnsupportedModelError, match="which cpu does not have"):
        DecodeGraph(model, StaticClusteredCache(model, profile, ROOM))
    with pytest.raises(UnsupportedModelError, match="compile_config"):
        model.get_compiled_call(object())
    twin = copy.deepcopy(model)
    assert twin.get_compiled_call().args == (twin,)
    disable(model)
    assert "get_compiled_call" not in vars(model)
