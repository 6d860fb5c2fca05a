"""Controls of streaming heads: at random, by attention mass, and by published patterns."""

import pickle
from types import SimpleNamespace

import pytest
import torch

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators import duo, registry
from chai_attention.evaluation.comparators.random_heads import random_profile
from chai_attention.evaluation.comparators.streaming import (
    MassStream,
    RandomStream,
    far_mass,
    streaming_profile,
)
from chai_attention.evaluation.profiled import low_bit_share
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import FOR_EVER, ClusterProfile
from chai_attention.runtime.shape import ModelShape, describe
from comparator_cases import batch, logits, text
from tiny_models import tiny_model

LOCAL = (8, 2)


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "opt"])
@pytest.mark.parametrize("made", [RandomStream, MassStream])
def test_they_save_what_is_asked_as_whole_kv_heads_and_run_as_a_profile(family, made):
    model = tiny_model(family)
    shape = describe(model)
    comparator = made(0.3, LOCAL)
    comparator.prepare(model, text())
    profile = comparator.profile
    heads = shape.layers * shape.kv_heads
    gone = sum(shape.kv_heads - profile.kept_values(n, shape) for n in range(shape.layers))
    assert gone == -(-3 * heads // 10)
    for layer in range(shape.layers):
        assert profile.kept_keys(layer, shape) == profile.kept_values(layer, shape)
        assert profile.clusters[layer] == shape.heads - len(profile.streaming[layer])
    assert 1 - comparator.kv_share(model, 10**9) == pytest.approx(gone / heads, abs=1e-6)
    assert 1 - comparator.kv_share(model, 20) == pytest.approx(gone / heads * (1 - 10 / 20))
    with comparator.attached(model):
        found = logits(model, batch())
    with enabled(model, profile):
        assert torch.equal(logits(model, batch()), found)
    assert (found - logits(model, batch())).abs().max() > 1e-3
    assert pickle.loads(pickle.dumps(comparator)).settings() == comparator.settings()


def test_the_seed_decides_which_heads_stream_at_random():
    model = tiny_model("opt")
    profiles = []
    for seed in (1, 1, 2):
        comparator = RandomStream(0.5, LOCAL, seed)
        comparator.prepare(model, ())
        profiles.append(comparator.profile)
    assert profiles[0] == profiles[1]
    assert profiles[0].streaming != profiles[2].streaming


@pytest.mark.parametrize("family", ["llama", "llama-grouped"])
def test_attention_mass_on_far_keys_is_what_its_definition_says(family):
    model = tiny_model(family)
    shape = describe(model)
    windows = text(windows=3)
    needs, local = MassStream(0.5, LOCAL).needs(model, windows, lambda *at: None)
    assert local == LOCAL
    expected = torch.zeros(shape.layers, shape.heads, dtype=torch.float64)
    model.set_attn_implementation("eager")
    for window in windows:
        with torch.no_grad():
            maps = model(window[None], output_attentions=True).attentions
        for layer, probabilities in enumerate(maps):
            for query in range(len(window)):
                far = range(LOCAL[1], query - LOCAL[0] + 1)
                for key in far:
                    expected[layer] += probabilities[0, :, query, key].double()
    expected = expected.view(shape.layers, shape.kv_heads, -1).sum(-1)
    torch.testing.assert_close(needs, expected, rtol=1e-4, atol=1e-4)


def test_far_keys_are_behind_the_window_and_after_the_sinks():
    maps = torch.ones(1, 3, 8)
    assert far_mass(maps, slice(5, 8), recent=3, sinks=2).tolist() == [1 + 2 + 3]


def test_windows_without_far_keys_are_refused():
    model = tiny_model("llama")
    with pytest.raises(EvaluationError, match="more than 132 tokens"):
        MassStream(0.5, (128, 4)).prepare(model, text())
    assert MassStream(0.5).needs(model, text(2), lambda *at: None)[1] == (24, 4)


def test_layers_with_sliding_windows_keep_their_heads():
    """A token adds nothing to what they hold: all that it adds can be saved."""
    shape = ModelShape("x", 2, 4, 2, 8, (False, True), sliding_window=8)
    needs = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    profile = streaming_profile(shape, needs, 0.5, LOCAL, "some")
    assert profile.streaming == ((), (2, 3))
    assert profile.saved(shape, FOR_EVER) == pytest.approx(0.5)
    assert streaming_profile(shape, needs, 0.6, LOCAL, "some").streaming == ((), (0, 1, 2, 3))


def test_the_profile_gives_the_bytes_and_the_window():
    model = tiny_model("llama")
    shape = describe(model)
    everyone = tuple(range(6))
    profile = ClusterProfile(
        (4, 6, 3), membership="static", recent=6, sinks=1, streaming=((0, 3), (), (5,)),
        representatives=(everyone, everyone, (0, 0, 2, 3, 2, 5)),
    )  # fmt: skip
    found = registry.comparators(
        ["random-stream", "mass-stream", "random"], model=model, tokens=text(), profile=profile
    )
    for name in ("random-stream", "mass-stream"):
        made = found[name].profile
        assert (made.recent, made.sinks) == (6, 1)
        assert sum(map(len, made.streaming)) == 4  # 6 + 2 units of K and V, two of a head
    random = found["random"].profile_for(model)
    assert [len(heads) for heads in random.streaming] == [2, 0, 1]
    assert random.clusters == profile.clusters
    assert random.saved(shape, 100) == profile.saved(shape, 100)
    assert found["random"].settings() == found["random"].settings()
    with pytest.raises(EvaluationError, match="saves, which is nothing"):
        registry.comparators(
            ["random-stream"], model=model, tokens=text(), profile=ClusterProfile((6, 6, 6))
        )


@pytest.mark.parametrize("seed", range(5))
def test_random_heads_of_grouped_queries_keep_the_bytes_of_a_profile_that_streams(seed):
    shape = describe(tiny_model("llama-grouped"))
    group = shape.heads // shape.kv_heads
    last = tuple(range(shape.heads - group, shape.heads))
    rep = tuple(range(shape.heads))
    profile = ClusterProfile(
        (shape.heads - group,) * shape.layers, membership="static", recent=6, target="k-bytes",
        streaming=(last,) * shape.layers, representatives=(rep,) * shape.layers,
    )  # fmt: skip
    random = random_profile(profile, shape, seed)
    random.check(shape)
    assert random.saved(shape, 1000) == profile.saved(shape, 1000)


def test_shares_of_narrow_caches_count_local_k_and_v_whole():
    model = tiny_model("llama")
    profile = RandomStream(0.5, (8, 2))
    profile.prepare(model, ())
    share = low_bit_share(profile.profile, model, 100, 0.5)
    assert share == pytest.approx(0.5 * 0.5 + 0.5 * 10 / 100)


class Patterns:
    """What kvpress's press would load."""

    def __init__(self, gates=None, error=None):
        self.gates, self.error = gates, error

    def load_attention_pattern(self, model):
        if self.error is not None:
            raise self.error
        return 3, 9, self.gates


def with_patterns(monkeypatch, **made):
    library = SimpleNamespace(DuoAttentionPress=Patterns(**made))
    monkeypatch.setattr(duo, "load_kvpress", lambda: library)


def test_published_gates_decide_which_heads_stream_and_their_window(monkeypatch):
    model = tiny_model("llama")
    gates = torch.linspace(0, 1, 18).view(3, 6).flip(0).numpy()
    with_patterns(monkeypatch, gates=gates)
    comparator = duo.Duo(4 / 18)
    comparator.prepare(model, ())
    assert comparator.profile.streaming == ((), (), (0, 1, 2, 3))
    assert (comparator.profile.recent, comparator.profile.sinks) == (9, 3)
    with comparator.attached(model):
        assert logits(model, batch()).isfinite().all()
    half = duo.Duo()
    half.prepare(model, ())
    assert sum(map(len, half.profile.streaming)) == 9


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"error": AssertionError("not in")}, "published no pattern"),
        ({"error": ConnectionError("no network\nat all")}, r"cannot be loaded \(ConnectionError"),
        ({"gates": torch.zeros(2, 6).numpy()}, "of another model"),
    ],
)
def test_patterns_that_cannot_be_loaded_are_named_as_left_out(monkeypatch, made, reason):
    model = tiny_model("llama")
    with_patterns(monkeypatch, **made)
    with pytest.raises(EvaluationError, match=reason) as caught:
        registry.comparators(["duo"], model=model, tokens=(), save=0.2)
    assert "\n" not in str(caught.value)
    names, messages = registry.available(None, model)
    assert "duo" not in names
    assert any(message.startswith("without duo: DuoAttention") for message in messages)
