"""`calibrate` as a whole: what it chooses, that it repeats itself, what it refuses."""

import pytest
import torch

from chai_attention.calibration import calibrate
from chai_attention.calibration.statistics import collect_grams
from chai_attention.clustering.assign import assign
from chai_attention.clustering.kmeans import inertia
from chai_attention.errors import CalibrationError, UnsupportedModelError
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.support import describe
from chai_attention.profile import ClusterProfile
from tiny_models import CONFIGS, tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "".join(f"Line {i} of some text, {i * i} and so on.\n" for i in range(200))
SMALL = {"samples": 6, "length": 24, "window": 8}


def same_heads(model, layer, twins):
    """Give heads of a llama layer the same Q and K weights, so that their maps are the same."""
    attention = model.model.layers[layer].self_attn
    size = attention.head_dim
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            for head, twin in twins.items():
                rows = projection.weight[twin * size : (twin + 1) * size]
                projection.weight[head * size : (head + 1) * size] = rows


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_gets_a_profile_it_can_run(family):
    model = tiny_model(family)
    profile = calibrate(model, TOKENIZER, TEXT, **SMALL)
    shape = describe(model)
    profile.check(shape)
    grouped = shape.kv_heads < shape.heads
    assert profile.target == ("k-bytes" if grouped else "scores")
    assert profile.membership == "online"
    assert profile.window == 8
    for free, k in zip(shape.clusterable, profile.clusters, strict=True):
        assert free or k == 6
    assert all(len(curve) == (2 if grouped else 6) for curve in profile.error)
    with enabled(model, profile), torch.no_grad():
        model(torch.ones(1, 12, dtype=torch.long))


@pytest.mark.parametrize("membership", ["online", "static"])
def test_heads_that_are_the_same_are_merged(membership):
    """The layer's six heads are two triples of twins; calibration has to find that out."""
    model = tiny_model("llama")
    same_heads(model, 1, {2: 0, 4: 0, 3: 1, 5: 1})
    profile = calibrate(model, TOKENIZER, TEXT, membership=membership, max_error=0.05, **SMALL)
    assert profile.clusters[1] == 2
    assert profile.clusters[0] > 2
    assert profile.error_of(1) == pytest.approx(0, abs=1e-5)
    assert profile.similarity[1][0][4] == 1
    assert profile.similarity[1][0][1] < 1
    if membership == "static":
        assert profile.representatives[1] == (0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize(("family", "target"), [("llama", "scores"), ("llama-grouped", "k-bytes")])
def test_a_static_membership_is_that_of_the_whole_text(family, target):
    model = tiny_model(family)
    windows = torch.randint(3, 82, (5, 30))
    profile = calibrate(model, TOKENIZER, windows, membership="static", clusters=3, length=30)
    shape = describe(model)
    grams = collect_grams(model, windows, 3, 6, batch_size=2)
    want = assign(grams, 3, shape.kv_heads, target)
    assert profile.representatives == tuple(map(tuple, want.tolist()))
    assert profile.clusters == (3, 3, 3)


def test_the_error_curve_is_the_k_means_error():
    model = tiny_model("llama")
    windows = torch.randint(3, 82, (5, 30))
    profile = calibrate(model, TOKENIZER, windows, length=30)
    grams = collect_grams(model, windows, 3, 6, batch_size=2)
    whole = inertia(grams, torch.zeros(3, 6, dtype=torch.long))
    for k in range(1, 7):
        error = inertia(grams, assign(grams, k, 6)) / whole
        got = [curve[k - 1] for curve in profile.error]
        assert got == pytest.approx(error.tolist(), abs=2e-6)


def test_the_same_seed_gives_the_same_file(tmp_path):
    files = []
    for number, seed in enumerate([5, 5, 6]):
        torch.manual_seed(number)
        profile = calibrate(tiny_model("llama"), TOKENIZER, TEXT, seed=seed, **SMALL)
        profile.save(tmp_path / f"{number}.json")
        files.append((tmp_path / f"{number}.json").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_provenance_tells_how_it_was_found():
    profile = calibrate(tiny_model("llama"), TOKENIZER, TEXT, source="a.txt", seed=9, **SMALL)
    assert profile.model == {
        "architecture": "llama", "layers": 3, "heads": 6, "kv_heads": 6, "head_dim": 8
    }  # fmt: skip
    found = profile.provenance
    assert (found["text"], found["samples"], found["length"], found["seed"]) == ("a.txt", 6, 24, 9)
    assert found["recipe"] == "default"
    assert found["method"] == "k-means, elbow"


def test_the_papers_recipe():
    profile = calibrate(
        tiny_model("llama-grouped"), TOKENIZER, TEXT, samples=4, length=24, recipe="paper"
    )
    assert (profile.window, profile.membership, profile.target) == (5, "online", "scores")
    assert profile.representatives is None
    assert profile.provenance["recipe"] == "paper"


def test_max_error_bounds_every_layer():
    model = tiny_model("llama")
    for bound in (0.5, 0.2, 0.0):
        profile = calibrate(model, TOKENIZER, TEXT, max_error=bound, **SMALL)
        assert all(profile.error_of(layer) <= bound for layer in range(3))


def test_given_counts_are_used():
    model = tiny_model("gemma2")
    assert calibrate(model, TOKENIZER, TEXT, clusters=2, target="scores", **SMALL).clusters == (
        6,
        2,
        2,
    )
    assert calibrate(
        model, TOKENIZER, TEXT, clusters=[6, 4, 1], target="scores", **SMALL
    ).clusters == (6, 4, 1)


def test_fewer_windows_than_samples_are_all_used():
    profile = calibrate(tiny_model("llama"), TOKENIZER, TEXT[:100], samples=50, length=24)
    assert profile.provenance["samples"] == 4


def test_the_length_defaults_to_what_fits_the_model():
    model = tiny_model("llama")
    model.config.max_position_embeddings = 40
    profile = calibrate(model, TOKENIZER, TEXT, samples=2)
    assert profile.provenance["length"] == 40


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"recipe": "mine"}, "unknown recipe 'mine'"),
        ("llama", {"membership": "both"}, "online or static"),
        ("llama", {"target": "bytes"}, "unknown target 'bytes'"),
        ("llama", {"target": "k-bytes"}, "for grouped-query models"),
        ("llama", {"window": 0}, "window needs at least 1"),
        ("llama", {"max_error": 1.5}, "not 1.5"),
        ("llama", {"max_error": -0.1}, "not -0.1"),
        ("llama", {"max_error": float("nan")}, "not nan"),
        ("llama", {"samples": 0}, "at least 1 sample"),
        ("llama", {"length": 1}, "length must be at least 2"),
        ("llama", {"length": 257}, "at most 256"),
        ("llama", {"clusters": "knee"}, "not 'knee'"),
        ("llama", {"clusters": 0}, "layer 0 cannot have 0 clusters; possible: 1, 2, 3, 4, 5, 6"),
        ("llama", {"clusters": 7}, "layer 0 cannot have 7"),
        ("llama", {"clusters": [2, 2]}, "2 numbers of clusters for 3 layers"),
        ("llama-grouped", {"clusters": 2}, "cannot have 2 clusters; possible: 3, 6"),
        ("gemma2", {"clusters": [3, 3, 3]}, "layer 0 cannot have 3 clusters; possible: 6"),
        ("llama", {"recipe": "paper", "membership": "static"}, "recipe paper"),
        ("llama-grouped", {"recipe": "paper", "target": "k-bytes"}, "recipe paper"),
    ],
)
def test_options_that_make_no_sense_are_refused(family, options, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(tiny_model(family), TOKENIZER, TEXT, **{**SMALL, **options})


@pytest.mark.parametrize("texts", ["", "too short", [], ["a", "b"]])
def test_too_little_text_is_refused(texts):
    with pytest.raises(CalibrationError, match="at least 24 tokens"):
        calibrate(tiny_model("llama"), TOKENIZER, texts, **SMALL)


def test_one_kv_head_cannot_give_up_its_keys():
    model = tiny_model("llama-grouped")
    model.config.num_key_value_heads = 1
    with pytest.raises(CalibrationError, match="has one per layer: use scores"):
        calibrate(model, TOKENIZER, TEXT, target="k-bytes", **SMALL)


def test_only_sliding_windows_leave_nothing_to_cluster():
    model = tiny_model("gemma3")
    model.config.layer_types = ["sliding_attention"] * 3
    with pytest.raises(CalibrationError, match="nothing to cluster"):
        calibrate(model, TOKENIZER, TEXT, **SMALL)


def test_a_model_with_clustered_heads_is_not_calibrated():
    model = tiny_model("llama")
    with (
        enabled(model, ClusterProfile((2, 2, 2))),
        pytest.raises(UnsupportedModelError, match="disable"),
    ):
        calibrate(model, TOKENIZER, TEXT, **SMALL)


def test_a_real_model_without_redundancy_keeps_most_heads(shared):
    """mha-lm's most similar pair of heads has a correlation of .68: little can be shared."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "mha-lm"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared / "data" / "wikitext-2" / "calibration.txt").read_text()[:40_000]
    profile = calibrate(model, tokenizer, text, samples=4, length=128, max_error=0.1)
    profile.check(describe(model))
    assert profile.target == "scores"
    assert sum(profile.clusters) > 0.7 * 14 * 16
    for curve in profile.error:
        assert curve == tuple(sorted(curve, reverse=True))
        assert curve[0] == 1
        assert curve[-1] == pytest.approx(0, abs=1e-6)
