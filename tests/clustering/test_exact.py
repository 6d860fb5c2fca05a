"""The best k-medoids against trying every choice."""

import itertools

import pytest
import torch

from chai_attention.clustering import exact
from chai_attention.clustering.exact import best_assignment


def total(cost, rep):
    return sum(cost[h, r].item() for h, r in enumerate(rep.tolist()) if h != r)


def best_by_trying(cost, groups, kept):
    heads = cost.shape[0]
    size = heads // groups
    best = float("inf")
    for chosen in itertools.combinations(range(groups), kept):
        allowed = [h for h in range(heads) if h // size in chosen]
        best = min(best, sum(min(cost[h, allowed]) for h in range(heads) if h not in allowed))
    return float(best)


@pytest.mark.parametrize("tried", ["few choices", "integer program"])
@pytest.mark.parametrize(("heads", "kv_heads", "target"), [(9, 9, "scores"), (12, 4, "k-bytes")])
def test_nothing_is_cheaper(heads, kv_heads, target, tried, monkeypatch):
    if tried == "integer program":
        monkeypatch.setattr(exact, "MAX_CHOICES", 0)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        cost = torch.rand(heads, heads, generator=generator, dtype=torch.float64)
        for kept in range(1, kv_heads + 1):
            clusters = kept * heads // kv_heads
            rep = best_assignment(cost, clusters, kv_heads, target)
            assert len(set(rep.tolist())) == clusters
            assert (rep[rep] == rep).all()
            assert total(cost, rep) == pytest.approx(best_by_trying(cost, kv_heads, kept))


def test_many_heads():
    """32 heads have more choices than can be tried; no swap may improve the answer."""
    cost = torch.rand(32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rep = best_assignment(cost, 11, 32)
    kept = sorted(set(rep.tolist()))
    assert len(kept) == 11
    best = total(cost, rep)
    for out, new in itertools.product(kept, set(range(32)) - set(kept)):
        swapped = [*(h for h in kept if h != out), new]
        price = sum(cost[h, swapped].min().item() for h in range(32) if h not in swapped)
        assert price >= best - 1e-3


def test_equal_heads_cost_nothing():
    cost = torch.ones(6, 6)
    cost[[2, 4], 0] = cost[[3, 5], 1] = 0.0
    cost.fill_diagonal_(0)
    assert best_assignment(cost, 2, 6).tolist() == [0, 1, 0, 1, 0, 1]


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="unknown target"):
        best_assignment(torch.rand(4, 4), 2, 4, "bytes")
