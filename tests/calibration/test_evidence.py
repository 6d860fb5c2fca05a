"""Evidence for several windows at once: the same as one after the other, from fewer runs."""

from dataclasses import replace

import pytest
import torch

from chai_attention.calibration.evidence import EvidenceStore
from chai_attention.calibration.recall import RecallSequences
from chai_attention.calibration.settings import Settings
from chai_attention.runtime.shape import describe
from tiny_models import tiny_model


def settings_of(model, **options):
    return Settings(recent=4, sinks=2, **options).resolve(describe(model))


def counting(model):
    """Windows of every forward pass from now on."""
    runs = []
    model.base_model.register_forward_hook(lambda module, args, out: runs.append(len(out[0])))
    return runs


@pytest.mark.parametrize("cost", ["gradient", "value"])
def test_all_windows_come_from_one_run_of_each_kind(cost):
    model, ids = tiny_model("llama-grouped"), torch.randint(3, 97, (2, 24))
    settings = settings_of(model, cost=cost)
    alone = EvidenceStore(model, ids).get(settings)
    runs = counting(model)
    store = EvidenceStore(model, ids)
    found = store.get_all(settings, [12, 4, 8])
    assert runs == [1, 2, 2]  # a look at the loss, maps with offsets, costs
    for name in ("grams", "costs", "offsets", "streaming"):
        torch.testing.assert_close(
            getattr(found[4], name), getattr(alone, name), rtol=1e-4, atol=1e-9
        )
    assert not torch.equal(found[4].streaming, found[12].streaming)
    assert not torch.equal(found[4].offsets, found[12].offsets)
    again = store.get(settings)
    assert torch.equal(again.costs, found[4].costs)
    assert store.missing(settings) == []
    assert len(runs) == 3
    assert store.missing(settings, [4, 16]) == ["attention maps", f"{cost} costs"]
    store.get_all(settings, [4, 16, 8])  # one is new
    assert runs[3:] == [1, 2, 2]
    assert found[4].streaming.shape == (3, 6)


def test_without_costs_nothing_is_known_of_streaming():
    model, ids = tiny_model("llama"), torch.randint(3, 97, (2, 24))
    found = EvidenceStore(model, ids).get(settings_of(model, recipe="elbow"))
    assert found.costs is None
    assert found.streaming is None
    assert found.offsets is not None


def test_other_costs_than_gradients_know_nothing_of_recalling():
    model, ids = tiny_model("llama"), torch.randint(3, 97, (2, 24))
    counted = torch.zeros(2, 24, dtype=torch.bool)
    counted[:, -3:] = True
    for cost, same in (("gradient", False), ("value", True)):
        settings = replace(settings_of(model, cost=cost), recall=1.0)
        store = EvidenceStore(model, ids)
        store.use_recall(RecallSequences(ids, counted))
        some = store.get(settings).costs
        assert torch.equal(some, EvidenceStore(model, ids).get(settings).costs) == same
