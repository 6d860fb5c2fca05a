"""Quantised caches: bytes held, errors, and answers by the definition."""

import pickle

import pytest
import torch

from chai_attention.errors import CacheError, UnsupportedModelError
from chai_attention.evaluation.comparators.quantised import (
    Quantised,
    bits_per_value,
    group_size,
)
from chai_attention.integrations.transformers.methods import cached_logits
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from comparator_cases import logits, traces
from compressed_contexts import ANSWER, RECENT, STATIC, by_definition, sequence
from tiny_models import tiny_model

WHOLE = ClusterProfile((6, 6, 6))


@pytest.fixture
def quantiser():
    pytest.importorskip("hqq", reason="needs the extra baselines")
    from hqq.core.quantize import Quantizer

    def both_ways(states, bits, group):
        codes, meta = Quantizer.quantize(
            states.contiguous(), nbits=bits, group_size=group, axis=1, device="cpu"
        )
        return Quantizer.dequantize(codes, {**meta, "compute_dtype": states.dtype})

    return both_ways


# ---- accounting, without the library


@pytest.mark.parametrize(
    ("head_dim", "group"),
    [(64, 32), (128, 64), (80, 40), (96, 48), (256, 64), (8, 4), (112, 56), (2, 1)],
)
def test_groups_fit_a_head_an_even_number_of_times(head_dim, group):
    assert group_size(head_dim) == group


def test_odd_heads_and_sliding_windows_are_refused():
    with pytest.raises(UnsupportedModelError, match="even size"):
        group_size(63)
    for method in (Quantised(8), Quantised(4, STATIC)):
        with pytest.raises(UnsupportedModelError, match="sliding-window"):
            method.prepare(tiny_model("gemma2"), ())


def test_scales_and_zeros_count():
    assert bits_per_value(8, 64) == 8.5
    assert bits_per_value(4, 32) == 5
    model = tiny_model("qwen3")  # D = 16: groups of 8
    assert Quantised(8).kv_share(model, 7) == 12 / 16
    assert Quantised(4).kv_share(model, 10**6) == 8 / 16


@pytest.mark.parametrize("bits", [8, 4])
def test_with_clusters_the_shares_multiply_but_for_the_recent_window(bits):
    model = tiny_model("qwen3")
    model.config.num_key_value_heads = 6  # only read
    quantised, shape = Quantised(bits), describe(model)
    for profile in (STATIC, WHOLE, RECENT):
        for length in (7, 40, 5000):
            share = Quantised(bits, profile).kv_share(model, length)
            window = profile.window_bytes(shape, 1)  # of 5 and 2 tokens
            full, kept = profile.bytes_per_token(shape, 1)
            wanted = quantised.kv_share(model, length) * kept / full + window / full / length
            assert share == pytest.approx(wanted)
    # until 7 tokens have decided, all heads' K and V
    assert Quantised(bits, RECENT).kv_share(model, 6) == quantised.kv_share(model, 6)


# ---- with it


def held_bytes(cache):
    """Bytes of what a cache's layers hold, transformers' or ours."""
    found = 0
    for layer in cache.layers:
        if hasattr(layer, "tensors"):
            tensors = list(layer.tensors().values())
        else:
            packed = layer._quantized_keys, layer._quantized_values
            tensors = [layer.keys, layer.values]
            tensors += [t for codes, meta in packed for t in (codes, meta["scale"], meta["zero"])]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
        found += sum(tensor.nbytes for tensor in tensors)
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt"])
def test_a_prompt_takes_the_bytes_that_the_share_says(quantiser, family, bits):
    model, tokens = tiny_model(family).to(torch.bfloat16), sequence(37)[None]
    shape = describe(model)
    full = 2 * 2 * shape.layers * shape.kv_heads * 37 * shape.head_dim
    for method in (Quantised(bits), Quantised(bits, STATIC)):
        cache = method.new_cache(model)
        with method.attached(model), torch.no_grad():
            model(tokens, past_key_values=cache)
            share = held_bytes(cache) / full
            assert share == pytest.approx(method.kv_share(model, 37))
            token = full / 37 if method.name.startswith("quant") else cache_token(shape)
            model(tokens[:, :1], past_key_values=cache)
        assert held_bytes(cache) == pytest.approx(share * full + token)


def cache_token(shape):
    """Bytes of one unquantised token in a cache with STATIC's clusters."""
    return STATIC.bytes_per_token(shape, 2)[1]


@pytest.mark.parametrize(("bits", "most"), [(8, 0.006), (4, 0.1)])
def test_errors_are_those_of_the_number_of_bits(quantiser, bits, most):
    states = torch.randn(1, 3, 41, 64)
    error = (quantiser(states, bits, 32) - states).abs()
    spread = states.unflatten(-1, (2, 32))
    step = (spread.amax(-1) - spread.amin(-1)) / (2**bits - 1)
    assert error.mean() / states.abs().mean() < most
    # half a step, and what fitting the zero to most values costs the others
    assert (error.unflatten(-1, (2, 32)).amax(-1) <= step).float().mean() > 0.9


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt", "qwen3"])
def test_answers_read_the_quantised_context(quantiser, family, bits):
    model, tokens = tiny_model(family), sequence()
    group = group_size(describe(model).head_dim)
    method = Quantised(bits)

    def compress(layer, query, key, value):
        return quantiser(key, bits, group), quantiser(value, bits, group), None

    found = cached_logits(model, method, tokens[None], ANSWER)[0]
    wanted = by_definition(model, tokens, compress)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    change = (found - logits(model, tokens[None])[0, -ANSWER:]).abs().max()
    assert 2e-3 < change < (0.1 if bits == 8 else 2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt"])
def test_answers_read_what_clustered_heads_keep_quantised(quantiser, family, bits):
    model, tokens = tiny_model(family), sequence()
    shape = describe(model)
    group = group_size(shape.head_dim)
    method = Quantised(bits, STATIC)

    def compress(layer, query, key, value):
        per = shape.group_size
        kept = sorted({head // per for head in STATIC.representatives[layer]})
        key[:, kept] = quantiser(key[:, kept], bits, group)
        return key, quantiser(value, bits, group), None

    with method.attached(model):
        found = cached_logits(model, method, tokens[None], ANSWER)[0]
    wanted = by_definition(model, tokens, compress, rep=STATIC.representatives)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    with method.attached(model):
        unquantised = logits(model, tokens[None])[0, -ANSWER:]
    assert 2e-3 < (found - unquantised).abs().max() < (0.1 if bits == 8 else 2)


@pytest.mark.parametrize("family", ["llama", "llama-grouped"])
def test_without_clusters_it_is_transformers_cache_token_by_token(quantiser, family):
    """Past the 128 tokens at which later tokens join the quantised ones."""
    model, tokens = tiny_model(family), sequence(150)[None]
    rows = []
    for method in (Quantised(4), Quantised(4, WHOLE)):
        cache, found = method.new_cache(model), []
        with method.attached(model), torch.no_grad():
            found.append(model(tokens[:, :11], past_key_values=cache).logits[:, -1])
            for n in range(11, 150):
                step = model(tokens[:, n : n + 1], past_key_values=cache)
                found.append(step.logits[:, -1])
        rows.append(torch.cat(found))
        assert cache.get_seq_length() == 150
    torch.testing.assert_close(rows[0], rows[1], atol=2e-3, rtol=1e-3)
    assert (rows[0] - logits(model, tokens)[0, 10:]).abs().max() > 1e-2


@pytest.mark.parametrize("length", [2, 5, 9, 40])
def test_online_memberships_and_recent_windows_work_beside_it(quantiser, length):
    """A membership that is decided after the prompt leaves K of other heads to be freed."""
    model, tokens = tiny_model("llama"), sequence(length + 6)
    method = Quantised(8, RECENT)
    with method.attached(model):
        found = cached_logits(model, method, tokens[None], 7)[0]
        unquantised = logits(model, tokens[None])[0, -7:]
    torch.testing.assert_close(found, unquantised, atol=0.1, rtol=0.05)


def test_answers_help_to_decide_memberships_after_short_contexts_only():
    online = Quantised(8, RECENT)
    assert [online.looks_ahead(context) for context in (1, 6, 7, 40)] == [True, True, False, False]
    assert not Quantised(8, STATIC).looks_ahead(1)
    assert not Quantised(8).looks_ahead(1)


@pytest.mark.parametrize("name", ["quant4", "chai+quant8"])
@pytest.mark.parametrize("context", [8, 30])
def test_rows_share_calls_and_see_neither_each_other_nor_padding(quantiser, name, context):
    model, tokens = tiny_model("llama"), sequence(context + 9)
    method = pickle.loads(pickle.dumps(Quantised(int(name[-1]), RECENT)))  # to another process
    assert not method.looks_ahead(context - 1)
    other = torch.cat([tokens[:context], tokens[-3:], torch.zeros(6, dtype=torch.long)])
    with method.attached(model):
        both = cached_logits(model, method, torch.stack([tokens, other]), 10)
        first = cached_logits(model, method, tokens[None], 10)[0]
        second = cached_logits(model, method, other[None, : context + 3], 4)[0]
    torch.testing.assert_close(both[0], first, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1, :4], second, atol=1e-4, rtol=1e-4)


def test_what_would_need_the_unquantised_cache_is_refused(quantiser):
    model, tokens = tiny_model("llama"), sequence(20)[None]
    method = Quantised(8, STATIC)
    cache, before = method.new_cache(model), traces(model)
    with method.attached(model), torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(CacheError, match="cropped"):
            cache.layers[0].crop(-3)
        with pytest.raises(CacheError, match="beam"):
            cache.layers[0].reorder_cache(torch.tensor([0]))
        cache.layers[0].reset()
        assert cache.layers[0].tensors() == {}
    assert traces(model) == before
