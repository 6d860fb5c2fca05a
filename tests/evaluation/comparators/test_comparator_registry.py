"""Every comparator by name: made, attached, taken off, the same twice."""

import pickle

import pytest
import torch

from chai_attention.errors import EvaluationError, UnsupportedModelError
from chai_attention.evaluation.comparators import registry
from chai_attention.evaluation.preparation import comparator_names
from chai_attention.profile import ClusterProfile
from comparator_cases import FAMILIES, batch, logits, text, traces
from tiny_models import tiny_model

OWN = tuple(name for name in registry.NAMES if name not in registry.EXTERNAL)


@pytest.fixture(autouse=True)
def _quick_predictors(monkeypatch):
    monkeypatch.setattr("chai_attention.evaluation.comparators.head_predictor.EPOCHS", 2)


def made(model, names, **options):
    options = {"save": 0.2, **options}
    return registry.comparators(names, model=model, tokens=text(), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_comparator_runs_and_leaves_no_trace_even_after_an_error(family):
    model = tiny_model(family)
    before, plain = traces(model), logits(model, batch())
    found = made(model, OWN)
    assert tuple(found) == OWN
    assert traces(model) == before
    for name, comparator in found.items():
        assert comparator.name == name
        assert comparator.source
        with comparator.attached(model):
            inside = logits(model, batch())
        assert inside.isfinite().all()
        with pickle.loads(pickle.dumps(comparator)).attached(model):  # as another process gets it
            assert torch.equal(logits(model, batch()), inside)
        assert 0 < comparator.kv_share(model, 21) <= 1
        with pytest.raises(KeyError), comparator.attached(model):
            raise KeyError(name)
        assert traces(model) == before
        assert torch.equal(logits(model, batch()), plain)
    for module in model.modules():
        assert not [key for key in vars(module) if key.startswith("_chai")]


@pytest.mark.parametrize("family", ["llama-grouped", "opt"])
def test_two_runs_are_identical(family):
    results = []
    for _ in range(2):
        torch.rand(1)  # the global state must not matter
        model = tiny_model(family)
        found = made(model, OWN, seed=5)
        rows = {}
        for name, comparator in found.items():
            with comparator.attached(model):
                rows[name] = logits(model, batch())
        results.append((rows, {name: dict(c.settings()) for name, c in found.items()}))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(row, results[1][0][name]) for name, row in results[0][0].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_those_with_a_budget_save_what_is_asked_and_the_others_say_that_they_save_nothing(family):
    model = tiny_model(family)
    unit = 1 / 36 if family != "llama-grouped" else 1 / 12  # K of one K/V head, one layer
    for name, comparator in made(model, OWN).items():
        saved = 1 - comparator.kv_share(model, 10**6)
        if name == "mha" or name.startswith("dejavu"):
            assert saved == 0
        elif name == "float8":
            assert saved == 0.5
        elif name == "chai+float8":
            assert 0.6 - 1e-4 <= saved < 0.6 + unit  # half of the default's two units
        elif name in ("default", "random", "spatten-heads", "random-stream", "mass-stream"):
            assert 0.2 - 1e-4 <= saved < 0.2 + 2 * unit  # K and V go together
        else:
            assert 0.2 - 1e-4 <= saved < 0.2 + unit, name


def test_a_profile_gives_the_saving_and_the_numbers_of_clusters():
    model = tiny_model("llama")
    profile = ClusterProfile((6, 4, 2))
    found = made(model, ["profile", "random", "chai", "spatten"], profile=profile, save=None)
    for name, comparator in found.items():
        assert 1 - comparator.kv_share(model, 10**6) == pytest.approx(6 / 36, abs=2e-3), name
    assert found["random"].profile_for(model).clusters == (6, 4, 2)
    assert found["chai"].settings()["save"] == pytest.approx(6 / 36)


def test_without_a_profile_random_heads_follow_the_default_recipe():
    model = tiny_model("opt")
    found = made(model, ["random", "default"])
    assert found["random"].profile_for(model).clusters == found["default"].profile.clusters


def test_unknown_names_and_missing_profiles_are_told():
    model = tiny_model("llama")
    with pytest.raises(EvaluationError, match=r"no comparator chia: .*dejavu-30"):
        made(model, ["mha", "chia"])
    with pytest.raises(EvaluationError, match="needs a profile"):
        made(model, ["profile"])
    with pytest.raises(EvaluationError, match="calibration windows"):
        registry.comparators(["dejavu-10"], model=model, tokens=[])


@pytest.fixture
def no_libraries(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("no such library", name="kvpress")

    monkeypatch.setattr(registry, "import_module", missing)


def test_external_baselines_without_their_library_are_left_out_of_all_and_name_their_extra(
    no_libraries,
):
    names, messages = registry.available()
    assert names == OWN
    assert len(messages) == len(registry.EXTERNAL)
    assert "think" in messages[0]
    assert registry.available(ClusterProfile((6, 4, 2)))[0] == ("profile", *OWN)
    model = tiny_model("llama")
    with pytest.raises(EvaluationError, match=r"needs kvpress: .*chai-attention\[baselines\]"):
        made(model, ["think"])
    assert tuple(made(model, ["all"])) == OWN


def test_a_table_of_all_says_what_it_leaves_out_and_keeps_what_is_asked_for_by_name(no_libraries):
    told = []
    assert comparator_names("all", None, None, told.append) == OWN
    assert [message.split(":")[0] for message in told] == [
        f"without {n}" for n in registry.EXTERNAL
    ]
    assert comparator_names("quant4,chai", None, None, told.append) == ("mha", "quant4", "chai")
    assert len(told) == len(registry.EXTERNAL)


def test_all_leaves_out_external_baselines_that_cannot_run_the_model(monkeypatch):
    class Refusing:
        def prepare(self, model, tokens, progress=None):
            raise UnsupportedModelError("not this one")

    monkeypatch.setattr(registry, "_external", lambda *arguments: Refusing())
    assert registry.available() == (registry.NAMES, ())
    names, messages = registry.available(None, tiny_model("opt"))
    assert names == OWN
    assert messages[0] == "without think: not this one"
