"""`calibrate` as a whole: what it chooses, that it repeats itself, what it refuses."""

import pytest
import torch

from chai_attention.calibration import calibrate
from chai_attention.calibration.data import hold_out
from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.perplexity import paired_rise, token_loss
from chai_attention.calibration.statistics import GramStatistics, observe
from chai_attention.clustering.assign import assign
from chai_attention.clustering.kmeans import inertia
from chai_attention.errors import CalibrationError, ChaiWarning, UnsupportedModelError
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from tiny_models import CONFIGS, tiny_model
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "".join(f"Line {i} of some text, {i * i} and so on.\n" for i in range(200))
SMALL = {"samples": 6, "length": 24, "window": 8}
ELBOW = {**SMALL, "recipe": "elbow"}
LOCAL = {**SMALL, "recent": 4, "sinks": 1}


def grams_of(model, windows):
    statistics = GramStatistics(3, 6)
    observe(model, windows, [statistics.add], batch_size=2)
    return statistics.grams


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
    profile = calibrate(model, TOKENIZER, TEXT, **ELBOW)
    shape = describe(model)
    profile.check(shape)
    grouped = 1 < shape.kv_heads < shape.heads  # one K/V head cannot be chosen among
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
    profile = calibrate(model, TOKENIZER, TEXT, membership=membership, max_error=0.05, **ELBOW)
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
    profile = calibrate(
        model, TOKENIZER, windows, recipe="elbow", membership="static", clusters=3, length=30
    )
    shape = describe(model)
    grams = grams_of(model, windows)
    want = assign(grams, 3, shape.kv_heads, target)
    assert profile.representatives == tuple(map(tuple, want.tolist()))
    assert profile.clusters == (3, 3, 3)


def test_the_error_curve_is_the_k_means_error():
    model = tiny_model("llama")
    windows = torch.randint(3, 82, (5, 30))
    profile = calibrate(model, TOKENIZER, windows, length=30, recipe="elbow")
    grams = grams_of(model, windows)
    whole = inertia(grams, torch.zeros(3, 6, dtype=torch.long))
    for k in range(1, 7):
        error = inertia(grams, assign(grams, k, 6)) / whole
        got = [curve[k - 1] for curve in profile.error]
        assert got == pytest.approx(error.tolist(), abs=2e-6)


def test_the_same_seed_gives_the_same_file(tmp_path):
    files = []
    for number, seed in enumerate([5, 5, 6]):
        torch.manual_seed(number)
        profile = calibrate(tiny_model("llama"), TOKENIZER, TEXT, seed=seed, **ELBOW)
        profile.save(tmp_path / f"{number}.json")
        files.append((tmp_path / f"{number}.json").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_provenance_tells_how_it_was_found():
    profile = calibrate(tiny_model("llama"), TOKENIZER, TEXT, source="a.txt", seed=9, **ELBOW)
    assert profile.model == {
        "architecture": "llama", "layers": 3, "heads": 6, "kv_heads": 6, "head_dim": 8
    }  # fmt: skip
    found = profile.provenance
    assert (found["text"], found["samples"], found["length"], found["seed"]) == ("a.txt", 6, 24, 9)
    assert found["recipe"] == "elbow"
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
        profile = calibrate(model, TOKENIZER, TEXT, max_error=bound, **ELBOW)
        assert all(profile.error_of(layer) <= bound for layer in range(3))


def test_given_counts_are_used():
    model = tiny_model("gemma2")
    assert calibrate(model, TOKENIZER, TEXT, clusters=2, target="scores", **ELBOW).clusters == (
        6,
        2,
        2,
    )
    assert calibrate(
        model, TOKENIZER, TEXT, clusters=[6, 4, 1], target="scores", **ELBOW
    ).clusters == (6, 4, 1)


def test_fewer_windows_than_samples_are_all_used():
    profile = calibrate(
        tiny_model("llama"), TOKENIZER, TEXT[:100], samples=50, length=24, recipe="elbow"
    )
    assert profile.provenance["samples"] == 4


def test_the_length_defaults_to_what_fits_the_model():
    model = tiny_model("llama")
    model.config.max_position_embeddings = 40
    profile = calibrate(model, TOKENIZER, TEXT, samples=2, recipe="elbow")
    assert profile.provenance["length"] == 40


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"recipe": "mine"}, "recipe 'mine' is none of default"),
        ("llama", {"membership": "both"}, "membership 'both' is none of online"),
        ("llama", {"target": "bytes"}, "target 'bytes' is none of scores"),
        ("llama", {"target": "k-bytes"}, "for grouped-query models"),
        ("llama", {"window": 0}, "window 0 is not a whole number of 1"),
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
        ("llama", {"recipe": "paper", "recent": 4}, "recipe paper"),
        ("llama", {"recipe": "paper", "cost": "gradient"}, "recipe paper"),
        ("llama", {"cost": "loss"}, "cost 'loss' is none of scores"),
        ("llama", {"refit": "all"}, "refit 'all' is none of none"),
        ("llama", {"features": "keys"}, "features 'keys' is none of scores"),
        ("llama", {"membership": "blend", "cost": "scores"}, "blend needs cost"),
        ("llama", {"blend": 0.5}, "need membership blend"),
        ("llama", {"recent": -1}, "numbers of tokens"),
        ("llama", {"recent": 23, "sinks": 1}, "covers all 24"),
        ("llama", {"recent": 0, "sinks": 4}, "sinks need a recent window"),
        ("llama", {"max_loss": 0.1, "save": 0.1}, "max_loss and save contradict each other"),
        (
            "llama",
            {"max_error": 0.1, "save": 0.1},
            r"contradict each other.*max_error is of clusters",
        ),
        ("llama", {"max_error": 0.1, "clusters": 3}, "max_error bounds the elbow: leave it out"),
        ("llama", {"max_loss": 0}, "such as 0.01 for 1%"),
        ("llama", {"save": 1.0}, "save is a share"),
        ("llama", {"removed": 0.0}, "removed is a share"),
        (
            "llama",
            {"save": 0.45, "recent": 4, "recipe": "share"},
            "save 45.0% is more than this model can",
        ),
        ("llama", {"save": 0.95, "recent": 4, "context": 20}, "more than an exact window of 4"),
        ("llama", {"recipe": "stream", "membership": "online"}, "recipe stream chooses heads by"),
        ("llama", {"recipe": "share", "context": 100}, "context is for recipes with streaming"),
        ("llama", {"recent": "auto", "recipe": "share"}, "recent is a number of tokens"),
        ("llama", {"recent": "some"}, "recent is a number of tokens, or auto"),
        ("llama", {"recent": 4, "context": 0}, "context is a number of tokens"),
        ("llama", {"length": 36, "samples": 6}, "32 [+] 4 tokens covers all 36"),
        ("llama-grouped", {"save": 0.1, "target": "scores"}, "save needs target k-bytes"),
        ("gemma-one", {"save": 0.1, "recipe": "share"}, "save needs recipe default or stream"),
        (
            "llama",
            {"samples": 2, "held_out": 3, "length": 250, "recent": 4},
            "at least 6 sequences",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(family, options, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(tiny_model(family), TOKENIZER, TEXT, **{**SMALL, **options})


@pytest.mark.parametrize("texts", ["", "too short", [], ["a", "b"]])
def test_too_little_text_is_refused(texts):
    with pytest.raises(CalibrationError, match="at least 24 tokens"):
        calibrate(tiny_model("llama"), TOKENIZER, texts, **LOCAL)


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
        calibrate(model, TOKENIZER, TEXT, **LOCAL)


def test_a_real_model_without_redundancy_keeps_most_heads(shared):
    """mha-lm's most similar pair of heads has a correlation of .68: little can be shared."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "mha-lm"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared / "data" / "wikitext-2" / "calibration.txt").read_text()[:40_000]
    profile = calibrate(
        model, tokenizer, text, samples=4, length=128, recipe="elbow", max_error=0.1
    )
    profile.check(describe(model))
    assert profile.target == "scores"
    assert sum(profile.clusters) > 0.7 * 14 * 16
    for curve in profile.error:
        assert curve == tuple(sorted(curve, reverse=True))
        assert curve[0] == 1
        assert curve[-1] == pytest.approx(0, abs=1e-6)


def test_the_default_keeps_its_promise_on_the_windows_it_was_measured_on():
    model = tiny_model("llama")
    windows = torch.randint(3, 82, (30, 24))
    held = torch.randint(3, 82, (12, 24))
    profile = calibrate(
        model, TOKENIZER, windows, length=24, held_out=held, max_loss=0.2, recent=4, sinks=1
    )
    assert (profile.membership, profile.recent, profile.sinks) == ("static", 4, 1)
    baseline = token_loss(model, held)
    with enabled(model, profile):
        rise = paired_rise(baseline, token_loss(model, held))
    promise = profile.promise
    assert promise["rise"] == pytest.approx(rise.rise, abs=1e-5)
    assert promise["standard_error"] == pytest.approx(rise.standard_error, abs=1e-5)
    assert rise.rise + 1.6 * rise.standard_error <= 0.2
    assert promise["windows"] == 12
    assert promise["saved"] == pytest.approx(profile.saved(describe(model), 24), abs=1e-6)


def test_a_loss_that_cannot_be_kept_is_refused():
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match="cannot be met: already the cheapest of all heads"):
        calibrate(model, TOKENIZER, TEXT, max_loss=1e-9, recipe="share", **LOCAL)
    with pytest.raises(CalibrationError, match="cannot be met: already the cheapest of all units"):
        calibrate(model, TOKENIZER, TEXT, max_loss=1e-9, **LOCAL)


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "gemma2"])
@pytest.mark.parametrize("share", [0.1, 0.15])
def test_the_bytes_asked_for_are_saved(family, share):
    model = tiny_model(family)
    shape = describe(model)
    profile = calibrate(model, TOKENIZER, TEXT, save=share, **LOCAL)
    full, kept = profile.bytes_per_token(shape, 2)
    saved = 1 - kept / full
    one_more = 1 / (2 * sum(shape.clusterable) * shape.kv_heads)
    assert share <= saved + 1e-9
    assert saved < share + one_more + 1e-9


def test_a_blended_membership_carries_its_costs():
    model = tiny_model("llama")
    profile = calibrate(
        model,
        TOKENIZER,
        TEXT,
        membership="blend",
        blend=0.5,
        features="value",
        removed=0.3,
        **LOCAL,
    )
    assert profile.blend == 0.5
    costs = torch.tensor(profile.costs)
    assert costs.shape == (3, 6, 6)
    assert (costs.diagonal(dim1=1, dim2=2) == 0).all()
    assert sum(profile.clusters) == 18 - 6
    with enabled(model, profile), torch.no_grad():
        model(torch.ones(1, 12, dtype=torch.long))


def test_a_store_is_used_again_for_the_same_text_only(monkeypatch):
    model = tiny_model("llama")
    windows = torch.randint(3, 82, (6, 24))
    store = EvidenceStore(model, windows)
    options = {"length": 24, "recent": 4, "removed": 0.3, "store": store, "measure": False}
    first = calibrate(model, TOKENIZER, windows, **options)
    runs = []
    hook = model.register_forward_pre_hook(lambda *args: runs.append(1))
    base = model.base_model.register_forward_pre_hook(lambda *args: runs.append(1))
    assert calibrate(model, TOKENIZER, windows, **options) == first
    assert not runs
    calibrate(model, TOKENIZER, windows.flip(0), **options)
    assert runs
    hook.remove()
    base.remove()


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="no option maxloss"):
        calibrate(tiny_model("llama"), TOKENIZER, TEXT, maxloss=0.1)


def test_as_many_windows_are_learnt_from_and_held_out_as_asked():
    """24 and 16 of a long text became 27 and 13."""
    profile = calibrate(
        tiny_model("llama"), TOKENIZER, TEXT, max_loss=0.9, **{**LOCAL, "samples": 24}, held_out=16
    )
    assert (profile.provenance["samples"], profile.promise["windows"]) == (24, 16)


def test_a_text_too_short_for_both_is_divided_aloud():
    with pytest.warns(
        ChaiWarning, match="has 12 sequences of 24 tokens, not 24 and 16: 8 .* and 4 "
    ):
        profile = calibrate(
            tiny_model("llama"),
            TOKENIZER,
            TEXT[: 12 * 24],
            max_loss=0.9,
            **{**LOCAL, "samples": 24},
            held_out=16,
        )
    assert (profile.provenance["samples"], profile.promise["windows"]) == (8, 4)


@pytest.mark.parametrize("asked", [{"save": 0.1}, {"removed": 0.3}])
def test_what_a_saving_costs_is_measured(asked):
    model = tiny_model("llama")
    windows = torch.randint(3, 82, (30, 24))
    profile = calibrate(model, TOKENIZER, windows, **LOCAL | {"samples": 20}, held_out=10, **asked)
    promise = profile.promise
    assert asked.items() <= promise.items()
    assert "max_loss" not in promise
    held = windows[hold_out(30, 10)]
    baseline = token_loss(model, held)
    with enabled(model, profile):
        rise = paired_rise(baseline, token_loss(model, held))
    assert promise["rise"] == pytest.approx(rise.rise, abs=1e-5)
    assert promise["windows"] == 10
    unmeasured = calibrate(model, TOKENIZER, windows, measure=False, **LOCAL, **asked)
    assert unmeasured.promise is None


def test_the_promise_of_a_model_in_training_is_that_without_dropout():
    model = tiny_model("gpt2")
    windows = torch.randint(3, 82, (30, 24))
    options = {"max_loss": 0.9, "held_out": 10, **LOCAL, "samples": 20}
    want = calibrate(model, TOKENIZER, windows, **options)
    model.train()
    assert calibrate(model, TOKENIZER, windows, **options) == want
    assert all(module.training for module in model.modules())


def test_calibration_works_inside_inference_mode():
    model = tiny_model("llama")
    want = calibrate(model, TOKENIZER, TEXT, removed=0.3, **LOCAL)
    with torch.inference_mode():
        assert calibrate(model, TOKENIZER, TEXT, removed=0.3, **LOCAL) == want
        windows = torch.randint(3, 82, (12, 24))
        calibrate(model, TOKENIZER, windows, removed=0.3, **LOCAL, held_out=4)


def test_weights_made_in_inference_mode_have_no_gradients():
    with torch.inference_mode():
        model = tiny_model("llama")
    with pytest.raises(CalibrationError, match="load the model outside of it"):
        calibrate(model, TOKENIZER, TEXT, removed=0.3, **LOCAL)
    assert calibrate(model, TOKENIZER, TEXT, removed=0.3, cost="value", **LOCAL).promise


@pytest.mark.parametrize("options", [{"recipe": "elbow"}, {"removed": 0.3, "recent": 4}])
def test_weights_that_are_nan_are_named(options):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = torch.nan
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        calibrate(model, TOKENIZER, TEXT, **SMALL, **options)


def test_a_dtype_that_overflows_is_named():
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
        model.lm_head.weight.fill_(6e4)
    with pytest.raises(CalibrationError, match="float16 overflows, load it in bfloat16 or float32"):
        calibrate(model, TOKENIZER, TEXT, removed=0.3, **LOCAL)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    model = tiny_model("llama")
    model.resize_token_embeddings(30)
    with pytest.raises(CalibrationError, match="embeds ids 0 to 29"):
        calibrate(model, TOKENIZER, TEXT, removed=0.3, **LOCAL)


def test_one_head_has_nothing_to_share_with():
    model = tiny_model("llama")
    model.config.num_attention_heads = model.config.num_key_value_heads = 1
    with pytest.raises(CalibrationError, match="one head a layer"):
        calibrate(model, TOKENIZER, TEXT, **LOCAL)


@pytest.mark.parametrize("blend", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_none_is_refused(blend):
    with pytest.raises(CalibrationError, match="blend is a weight"):
        calibrate(tiny_model("llama"), TOKENIZER, TEXT, membership="blend", blend=blend, **LOCAL)


def test_steps_are_numbered_and_their_number_is_known():
    told = []

    def tell(what, done, total):
        told.append(what)

    calibrate(tiny_model("llama"), TOKENIZER, TEXT, save=0.1, progress=tell, **LOCAL)
    assert list(dict.fromkeys(told)) == [
        "step 1 of 4: attention maps",
        "step 2 of 4: gradient costs",
        "step 3 of 4: perplexity of the model",
        "step 4 of 4: perplexity with clusters",
    ]
    told.clear()
    calibrate(
        tiny_model("llama"), TOKENIZER, TEXT, max_loss=0.3, recipe="share", progress=tell, **LOCAL
    )
    # of 15 heads: 1, 2, 4, 8, 15 and three more between
    assert told[0].startswith("step 1 of at most 11: ")
    assert all(int(what.split()[1]) <= 11 for what in told)
    told.clear()
    calibrate(tiny_model("llama"), TOKENIZER, TEXT, max_loss=0.3, progress=tell, **LOCAL)
    most = int(told[0].split()[5].rstrip(":"))
    assert all(int(what.split()[1]) <= most for what in told)


@pytest.mark.parametrize("window", [23, 24, 100])
@pytest.mark.parametrize("membership", ["online", "blend"])
def test_a_loss_of_nothing_is_no_promise(membership, window):
    """No head shares behind a window that ends with the sequence, so the rise is always 0."""
    options = {
        **SMALL, "recipe": "share", "recent": 4, "membership": membership, "max_loss": 0.01,
        "length": 24,
    }  # fmt: skip
    with pytest.raises(CalibrationError, match=rf"first {window} tokens, which leaves nothing"):
        calibrate(tiny_model("llama"), TOKENIZER, TEXT, **{**options, "window": window})
    found = calibrate(tiny_model("llama"), TOKENIZER, TEXT, **{**options, "window": 12})
    assert found.window == 12


def test_a_probe_window_longer_than_the_model_reads_is_refused():
    with pytest.raises(CalibrationError, match="first 256 tokens, and this model reads 256"):
        calibrate(
            tiny_model("llama"), TOKENIZER, TEXT, samples=4, length=24, recipe="paper", clusters=3,
            window=256,
        )  # fmt: skip
