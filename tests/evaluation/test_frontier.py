"""The frontier on a tiny model with a stand-in for calibration."""

import json
from dataclasses import fields

import pytest
import torch

from chai_attention.calibration.perplexity import paired_rise, token_loss
from chai_attention.calibration.settings import Settings
from chai_attention.errors import CalibrationError, ProfileError
from chai_attention.evaluation import frontier as module
from chai_attention.evaluation.frontier import (
    RECIPES,
    FrontierTexts,
    digest_of,
    for_bytes,
    recipes_named,
)
from chai_attention.evaluation.points import FrontierError, PointFile, load_points
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import describe
from tiny_models import tiny_model

HEADS, LAYERS = 6, 3
RECIPE = {"first": {"cost": "gradient"}, "second": {"cost": "value", "recent": 2}}
PROFILE = ClusterProfile((2, 6, 3), window=4)


@pytest.fixture
def model():
    return tiny_model("llama")


def some_text(count=3, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"t.txt": torch.randint(3, 97, (count, width), generator=generator)}


def frontier(
    model, recipes, budgets, test, *, contexts=None, file=None, about=None, **options
):  # fmt: skip
    texts = FrontierTexts(test, contexts)
    kept = None if file is None else PointFile(file, about or {})
    return module.frontier(model, recipes, budgets, texts, kept=kept, **options)


class Calibrate:
    """Merges heads 0 to n - 1 of every layer, and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, save=None, removed=None, **settings):
        self.calls.append({"save": save, "removed": removed, **settings})
        count = round((save or removed) * HEADS) + 1
        rep = tuple(0 if h < count else h for h in range(HEADS))
        return ClusterProfile(
            (len(set(rep)),) * LAYERS,
            membership="static",
            representatives=(rep,) * LAYERS,
            recent=settings.get("recent", 0),
        )


def test_every_recipe_budget_and_context_gives_its_own_measurement(model):
    calibrate = Calibrate()
    test = some_text()
    points = frontier(model, RECIPE, [0.2, 0.5], test, calibrate_one=calibrate, contexts=[8, 24])
    assert calibrate.calls == [
        {"save": share, "removed": None, **settings}
        for settings in RECIPE.values()
        for share in (0.2, 0.5)
    ]
    asked = [(p.recipe, p.budget, p.context) for p in points]
    assert asked == [(r, b, c) for r in RECIPE for b in (0.2, 0.5) for c in (8, 24)]
    shape = describe(model)
    for point in points:
        profile = Calibrate()(save=point.budget, **RECIPE[point.recipe])
        windows = test["t.txt"]
        if point.context == 8:  # the same tokens in shorter windows
            windows = torch.stack([row[i : i + 8] for row in test["t.txt"] for i in (0, 8, 16)])
        before = token_loss(model, windows)
        with enabled(model, profile):
            rise = paired_rise(before, token_loss(model, windows))
        assert point.rise == pytest.approx(rise.rise, abs=1e-5)
        assert point.standard_error == pytest.approx(rise.standard_error, abs=1e-5)
        assert point.baseline == pytest.approx(before.perplexity, rel=1e-5)
        assert point.saved == pytest.approx(profile.saved(shape, point.context))
        assert point.removed == pytest.approx(1 - profile.clusters[0] / HEADS)
        assert (point.windows, point.text, point.asked) == (len(windows), "t.txt", "save")
        assert not point.at_least
        assert point.seconds > 0
    assert points[0].rise != 0


def test_shares_of_heads_are_asked_as_removed(model):
    calibrate = Calibrate()
    points = frontier(
        model, {"a": {}}, [0.3], some_text(), calibrate_one=calibrate, asked="removed"
    )
    assert calibrate.calls == [{"save": None, "removed": 0.3}]
    assert points[0].asked == "removed"


def test_the_model_without_clusters_is_scored_once_per_text_and_context(model, monkeypatch):
    scored = []

    def counting(model_, windows, **options):
        enabled_now = model_.config._attn_implementation == "chai"
        scored.append((enabled_now, windows.shape[1]))
        return token_loss(model_, windows, **options)

    monkeypatch.setattr(module, "token_loss", counting)
    test = {**some_text(), "u.txt": some_text(seed=1)["t.txt"]}
    frontier(model, RECIPE, [0.2, 0.5], test, calibrate_one=Calibrate(), contexts=[8, 24])
    assert sorted(w for on, w in scored if not on) == [8, 8, 24, 24]
    assert sum(on for on, _ in scored) == 16
    assert model.config._attn_implementation != "chai"


def test_a_ready_profile_is_measured_as_it_is(model):
    points = frontier(
        model, {"mine": PROFILE}, [], some_text(), calibrate_one=pytest.fail, contexts=[24, 12]
    )
    assert [(p.recipe, p.asked, p.budget, p.seconds) for p in points] == [
        ("mine", None, None, 0.0)
    ] * 2
    assert points[0].removed == pytest.approx(7 / 18)


def test_a_context_that_ends_before_the_window_saves_nothing_and_costs_nothing(model):
    profile = ClusterProfile((2, 6, 3), window=12)
    points = frontier(
        model, {"p": profile}, [], some_text(), calibrate_one=pytest.fail, contexts=[24, 11]
    )
    saved = {point.context: point.saved for point in points}
    assert saved == {24: pytest.approx(7 / 36), 11: 0}
    assert [point.rise == 0 for point in points] == [point.context == 11 for point in points]


def test_bytes_saved_online_with_grouped_queries_are_a_bound():
    model = tiny_model("llama-grouped")
    for profile, bound in [
        (PROFILE, True),
        (ClusterProfile((3, 6, 3), target="k-bytes"), False),
    ]:
        (point,) = frontier(model, {"p": profile}, [], some_text(), calibrate_one=pytest.fail)
        assert point.at_least is bound


def test_a_rerun_skips_what_is_there(model, tmp_path):
    file = tmp_path / "f.json"
    options = {"test": some_text(), "file": file, "about": {"model": "tiny", "text": ("a", "b")}}
    first = frontier(model, RECIPE, [0.2], contexts=[24], calibrate_one=Calibrate(), **options)
    assert load_points(file) == first
    again = frontier(model, RECIPE, [0.2], contexts=[24], calibrate_one=pytest.fail, **options)
    assert again == first
    # more of everything: only that is measured
    calibrate = Calibrate()
    more = {**RECIPE, "third": {}}
    points = frontier(model, more, [0.2, 0.5], contexts=[24], calibrate_one=calibrate, **options)
    assert len(calibrate.calls) == 4
    assert [p for p in points if p in first] == first
    assert load_points(file) == [*first, *(p for p in points if p not in first)]
    calibrate = Calibrate()
    frontier(model, RECIPE, [0.2], contexts=[24, 8], calibrate_one=calibrate, **options)
    assert len(calibrate.calls) == 2


@pytest.mark.parametrize("change", ["settings", "text", "asked", "profile"])
def test_what_is_not_the_same_is_measured_again(change, model, tmp_path):
    recipes, test, asked = {"a": {"cost": "value"}, "p": PROFILE}, some_text(), "save"
    file = tmp_path / "f.json"
    frontier(model, recipes, [0.2], test, calibrate_one=Calibrate(), asked=asked, file=file)
    if change == "settings":
        recipes["a"] = {"cost": "gradient"}
    elif change == "text":
        test = some_text(seed=9)
    elif change == "asked":
        asked = "removed"
    else:
        recipes["p"] = ClusterProfile((3, 3, 3), window=4)
    calibrate = Calibrate()
    frontier(model, recipes, [0.2], test, calibrate_one=calibrate, asked=asked, file=file)
    assert len(calibrate.calls) == (0 if change == "profile" else 1)
    assert len(load_points(file)) == (4 if change == "text" else 3)


def test_points_are_kept_when_a_later_one_fails(model, tmp_path):
    calibrate = Calibrate()

    def failing(**settings):
        if calibrate.calls:
            raise KeyboardInterrupt
        return calibrate(**settings)

    with pytest.raises(KeyboardInterrupt):
        frontier(model, RECIPE, [0.2], some_text(), calibrate_one=failing, file=tmp_path / "f.json")
    assert [p.recipe for p in load_points(tmp_path / "f.json")] == ["first"]


def test_a_budget_that_cannot_be_met_is_left_out_or_raised(model):
    def refusing(**settings):
        if settings["save"] > 0.3:
            raise CalibrationError("too much")
        return Calibrate()(**settings)

    refused = []
    points = frontier(
        model,
        RECIPE,
        [0.5, 0.2],
        some_text(),
        calibrate_one=refusing,
        on_refusal=lambda name, budget, error: refused.append((name, budget, str(error))),
    )
    assert refused == [(name, 0.5, "too much") for name in RECIPE]
    assert [(p.recipe, p.budget) for p in points] == [(name, 0.2) for name in RECIPE]
    with pytest.raises(CalibrationError, match="too much"):
        frontier(model, RECIPE, [0.5], some_text(), calibrate_one=refusing)


def test_progress_counts_points(model):
    told = []
    frontier(
        model,
        {**RECIPE, "p": PROFILE},
        [0.2],
        some_text(),
        calibrate_one=Calibrate(),
        contexts=[8, 24],
        progress=lambda *args: told.append(args),
    )
    assert ("calibrating second at 20.0%", 2, 6) in told
    assert ("perplexity of p at 24 tokens", 4, 6) in told
    assert told[-1] == ("done", 6, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"asked": "heads"}, "save or removed"),
        ({"budgets": []}, "first needs at least one budget"),
        ({"budgets": [0.1, 1.0]}, "above 0 and below 1, not 1"),
        ({"budgets": [0.0]}, "above 0 and below 1, not 0"),
        ({"recipes": {}}, "at least one recipe"),
        ({"test": {}}, "one test text"),
        ({"contexts": []}, "one context length"),
        ({"contexts": [25]}, "2 to 24 tokens"),
        ({"contexts": [1]}, "2 to 24 tokens"),
        ({"test": some_text(count=1)}, "one window of 24 tokens"),
        ({"test": {"t": torch.zeros(3, 24)}}, "int64"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(change, message, model):
    arguments = {"recipes": RECIPE, "budgets": [0.2], "test": some_text(), **change}
    with pytest.raises(FrontierError, match=message):
        frontier(model, calibrate_one=pytest.fail, **arguments)


def test_a_profile_of_another_model_is_refused(model):
    with pytest.raises(ProfileError, match="2 layers"):
        frontier(model, {"p": ClusterProfile((2, 2))}, [], some_text(), calibrate_one=pytest.fail)


def test_a_perplexity_that_is_no_number_is_an_error(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FrontierError, match="not a number"):
        frontier(model, {"p": PROFILE}, [], some_text(), calibrate_one=pytest.fail)


def test_recipes_by_name(tmp_path):
    path = tmp_path / "p.json"
    PROFILE.save(path)
    assert recipes_named(["paper", str(path)]) == {"paper": RECIPES["paper"], str(path): PROFILE}
    assert recipes_named(["all"]) == RECIPES
    with pytest.raises(FrontierError, match=r"no recipe 'papr'.*paper, online"):
        recipes_named(["papr"])
    with pytest.raises(ProfileError):
        recipes_named(["none.json"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_one_that_calibration_takes(name):
    assert set(RECIPES[name]) <= {field.name for field in fields(Settings)}
    resolved = Settings(**RECIPES[name], removed=0.1).resolve(describe(tiny_model("llama")))
    recent = {"default": "auto", "stream": "auto", "share": 32}
    assert resolved.recent == recent.get(name, 32 if "recent" in name else 0)
    json.dumps(RECIPES[name])


def test_digests_tell_windows_apart():
    windows = some_text()["t.txt"]
    assert digest_of(windows) == digest_of(windows.clone())
    assert digest_of(windows) != digest_of(windows[:2])
    assert digest_of(windows[:, ::2]) == digest_of(windows[:, ::2].contiguous())


@pytest.mark.parametrize("family", ["llama", "llama-grouped"])
def test_the_papers_recipe_can_save_bytes_of_any_model(family):
    shape = describe(tiny_model(family))
    recipes = for_bytes(RECIPES, shape)
    assert set(recipes) == set(RECIPES)
    assert recipes["paper"]["target"] == ("scores" if family == "llama" else "k-bytes")


def test_shorter_windows_begin_as_every_text_begins():
    """Without its first token a model like Gemma is no model: its shorter contexts were so."""
    body = torch.randint(3, 82, (4, 24))
    windows = torch.cat([torch.ones(4, 1, dtype=torch.long), body], dim=1)
    (whole,) = FrontierTexts({"t": windows}, [25], (1,)).cut()
    assert torch.equal(whole.windows, windows)
    (cut,) = FrontierTexts({"t": windows}, [9], (1,)).cut()
    assert cut.windows.shape == (12, 9)
    assert cut.windows[:, 0].eq(1).all()
    assert torch.equal(cut.windows[:, 1:].reshape(4, 24), body)
    with pytest.raises(FrontierError, match="cannot begin with the 1 tokens"):
        FrontierTexts({"t": body}, [9], (1,)).cut()
