"""CHAI's rows are what calibration and the runtime make of their recipes; random ones too."""

import pytest
import torch

from chai_attention.calibration.calibrate import calibrate
from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.chai import Chai
from chai_attention.evaluation.comparators.mha import Mha
from chai_attention.evaluation.comparators.random_heads import RandomHeads
from chai_attention.integrations.transformers import enabled
from chai_attention.profile import ClusterProfile
from comparator_cases import FAMILIES, batch, logits, text
from tiny_models import tiny_model


def test_mha_is_the_model_itself():
    model = tiny_model("opt")
    with Mha().attached(model):
        inside = logits(model, batch())
    assert torch.equal(inside, logits(model, batch()))
    assert Mha().kv_share(model, 7) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["chai", "chai-static"])
def test_the_recipes_are_the_papers(family, name):
    model = tiny_model(family)
    comparator = Chai(name)
    comparator.prepare(model, text())
    profile = comparator.profile
    assert profile.target == ("k-bytes" if family == "llama-grouped" else "scores")
    assert profile.recent == 0
    assert profile.provenance["cost"] == "scores"
    assert profile.provenance["max_error"] == 1.0  # the bare elbow
    if name == "chai":
        assert (profile.membership, profile.window) == ("online", 5)
    else:
        assert profile.membership == "static"
    with comparator.attached(model):
        found = logits(model, batch())
    with enabled(model, profile):
        assert torch.equal(logits(model, batch()), found)


def test_both_of_the_papers_have_the_same_clusters_per_layer():
    model = tiny_model("llama")
    online, static = Chai("chai"), Chai("chai-static")
    for comparator in (online, static):
        comparator.prepare(model, text())
    assert online.profile.clusters == static.profile.clusters


def test_the_default_is_calibrations_default():
    model = tiny_model("llama")
    comparator = Chai("default", save=0.15, seed=2)
    comparator.prepare(model, text())
    windows = torch.stack(text())
    wanted = calibrate(
        model, None, windows, samples=16, length=48, save=0.15, seed=2, measure=False
    )
    assert comparator.profile.representatives == wanted.representatives
    assert comparator.profile.recent == wanted.recent == 32


def test_a_comparator_that_is_not_prepared_says_so():
    model = tiny_model("llama")
    with pytest.raises(EvaluationError, match="prepare"), Chai("chai").attached(model):
        pass
    with pytest.raises(EvaluationError, match="same number of tokens"):
        Chai("chai").prepare(model, [torch.ones(5).long(), torch.ones(6).long()])


@pytest.mark.parametrize("family", ["llama", "llama-grouped"])
def test_random_heads_have_the_profiles_sizes_and_other_members(family):
    model = tiny_model(family)
    fitted = Chai("share", save=0.2)
    fitted.prepare(model, text())
    profile = fitted.profile
    random, other = (RandomHeads(profile, seed).profile_for(model) for seed in (0, 1))
    assert random == RandomHeads(profile, 0).profile_for(model)
    assert random.representatives != other.representatives
    assert (random.clusters, random.target) == (profile.clusters, profile.target)
    assert (random.recent, random.offsets) == (profile.recent, profile.offsets)
    for k, rep in zip(random.clusters, random.representatives, strict=True):
        assert len(set(rep)) == k
        assert all(rep[head] == head for head in rep)
    for length in (9, 5000):
        share = RandomHeads(profile).kv_share(model, length)
        assert share == pytest.approx(fitted.kv_share(model, length))


def test_random_heads_of_an_online_profile_are_static():
    model = tiny_model("opt")
    comparator = RandomHeads(ClusterProfile((3, 6, 1), window=5))
    profile = comparator.profile_for(model)
    assert profile.membership == "static"
    assert [len(set(rep)) for rep in profile.representatives] == [3, 6, 1]
