"""The choice of K/V heads that keep their K against brute force."""

import itertools
from math import comb

import pytest
import torch

from chai_attention.clustering import kmedoids as module
from chai_attention.clustering.assign import assign
from chai_attention.clustering.kmeans import squared_distances
from chai_attention.clustering.kmedoids import kmedoids
from chai_attention.membership import Membership

NO_TIES = torch.zeros(1, dtype=torch.float64)


def random_cost(heads, batch=1, seed=0):
    """Asymmetric, as the cost of using another head's scores is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, heads, generator=generator, dtype=torch.float64)


def total(cost, rep):
    return sum(cost[h, r].item() for h, r in enumerate(rep.tolist()) if h != r)


def best_by_trying(cost, kv_heads, kept):
    heads = cost.shape[0]
    group = heads // kv_heads
    best = float("inf")
    for chosen in itertools.combinations(range(kv_heads), kept):
        allowed = [h for h in range(heads) if h // group in chosen]
        best = min(best, sum(min(cost[h, allowed]) for h in range(heads) if h not in allowed))
    return float(best)


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 4), (14, 2), (6, 6), (12, 1)])
def test_is_the_best_of_all_choices(heads, kv_heads):
    cost = random_cost(heads, batch=3, seed=heads)
    group = heads // kv_heads
    for kept in range(1, kv_heads + 1):
        rep = kmedoids(cost, kv_heads, kept, NO_TIES.expand(3))
        for row, one in zip(rep, cost, strict=True):
            assert total(one, row) == pytest.approx(best_by_trying(one, kv_heads, kept))
            used = {int(r) // group for r in row}
            assert len(used) == kept
            for head, r in enumerate(row.tolist()):
                assert (r == head) == (head // group in used)


@pytest.mark.parametrize("seed", range(4))
def test_too_many_choices_to_try_all(seed, monkeypatch):
    cost = random_cost(16, batch=2, seed=seed)
    monkeypatch.setattr(module, "MAX_CHOICES", 1)
    for kept in (1, 3, 7, 8):
        rep = kmedoids(cost, 8, kept, NO_TIES.expand(2))
        for row, one in zip(rep, cost, strict=True):
            assert len({int(r) // 2 for r in row}) == kept
            assert total(one, row) <= 1.15 * best_by_trying(one, 8, kept) + 1e-9


def test_many_kv_heads():
    """More subsets than can be tried, in one batch."""
    assert comb(24, 12) > module.MAX_CHOICES
    rep = kmedoids(random_cost(48, batch=2), 24, 12, NO_TIES.expand(2))
    assert all(len({int(r) // 2 for r in row}) == 12 for row in rep)


def test_equal_costs_go_to_the_lowest_heads():
    cost = torch.ones(1, 9, 9, dtype=torch.float64)
    rep = kmedoids(cost, 3, 1, NO_TIES)
    assert rep.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("kept", [0, 4])
def test_impossible_numbers_are_refused(kept):
    with pytest.raises(ValueError, match="cannot keep"):
        kmedoids(random_cost(9), 3, kept, NO_TIES)


@pytest.mark.parametrize("clusters", [3, 6, 9])
def test_assign_frees_whole_kv_heads(clusters):
    points = torch.rand(4, 9, 20)
    gram = points @ points.mT
    rep = assign(gram, clusters, 3, "k-bytes")
    member = Membership.from_representatives(rep, clusters, 3)
    assert member.kept_keys == clusters // 3
    for row, one in zip(rep, squared_distances(gram.double()), strict=True):
        best = best_by_trying(one, 3, clusters // 3)
        assert total(one, row) == pytest.approx(best, rel=1e-2)  # within the margin of ties


def test_assign_is_steady_under_rounding():
    points = torch.rand(8, 12, 20, dtype=torch.float64)
    points[:, 6:] = points[:, :6]  # every K/V head has an exact double
    gram = points @ points.mT
    want = assign(gram, 6, 4, "k-bytes")
    noise = torch.randn_like(gram)
    assert torch.equal(assign(gram * (1 + 1e-7 * (noise + noise.mT)), 6, 4, "k-bytes"), want)


def test_assign_refuses_what_does_not_fit():
    gram = torch.eye(9)[None]
    with pytest.raises(ValueError, match="multiple of 3"):
        assign(gram, 4, 3, "k-bytes")
    with pytest.raises(ValueError, match="unknown target"):
        assign(gram, 3, 3, "bytes")
