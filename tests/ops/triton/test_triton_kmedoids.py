"""The k-medoids kernel against the search it has to reproduce."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.clustering import kmedoids as search
from chai_attention.clustering.assign import K_BYTES, SCORES, assign, assign_by_cost
from chai_attention.clustering.kmeans import TIE, squared_distances
from chai_attention.membership import Membership
from chai_attention.ops.triton.kmedoids import kmedoids
from chai_attention.runtime.plan import relative
from membership_checks import assert_same_membership

pytestmark = pytest.mark.usefixtures("nan_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def costs_of(batch: int, heads: int) -> torch.Tensor:
    """Costs that are not symmetric, of heads that fall into a few kinds."""
    kind = torch.randint(5, (batch, heads))
    between = torch.rand(batch, 5, 5)
    cost = between.gather(1, kind[:, :, None].expand(-1, -1, 5))
    cost = cost.gather(2, kind[:, None].expand(-1, heads, -1))
    return cost + 0.3 * torch.rand(batch, heads, heads)


def check(cost: torch.Tensor, clusters: int, kv_heads: int, **options) -> None:
    """Compare with `assign_by_cost` for both targets that fit."""
    heads = cost.shape[1]
    for target in (SCORES, K_BYTES):
        unit = 1 if target == SCORES else heads // kv_heads
        if clusters % unit:
            continue
        got = kmedoids(
            cost.to(DEVICE), clusters, unit=unit, group=unit, tie=TIE,
            choices=search.choices(heads // unit, clusters // unit), **options,
        )  # fmt: skip
        want = assign_by_cost(cost, clusters, kv_heads, target)
        want = Membership.from_representatives(want, clusters, heads // unit)
        assert_same_membership(got, want, (8, 2))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters"),
    [(9, 3, 1), (9, 3, 3), (9, 3, 6), (9, 3, 8), (9, 3, 9), (12, 6, 4), (20, 20, 2), (20, 20, 18),
     (32, 8, 4), (32, 8, 16), (32, 32, 31), (52, 52, 6), (64, 8, 24), (2, 1, 2)],
)  # fmt: skip
def test_equals_the_search_in_torch(heads, kv_heads, clusters):
    check(costs_of(3, heads), clusters, kv_heads)


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (12, 12), (24, 12)])
def test_swaps(heads, kv_heads, monkeypatch):
    monkeypatch.setattr(search, "MAX_CHOICES", 0)
    for clusters in range(1, heads + 1, 2 if heads == 9 else 4):
        check(costs_of(2, heads), clusters, kv_heads)


@pytest.mark.parametrize("choices", [0, 1000])
def test_ties_go_to_the_lowest_heads(choices, monkeypatch):
    monkeypatch.setattr(search, "MAX_CHOICES", choices)
    pairs = costs_of(2, 5).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for cost in (torch.ones(1, 10, 10), torch.zeros(1, 10, 10), pairs):
        for clusters in (1, 2, 5, 9, 10):
            check(cost, clusters, 5)


@pytest.mark.parametrize(("heads", "clusters"), [(9, 4), (32, 4), (32, 16)])
def test_blends_static_costs(heads, clusters):
    distance, table = costs_of(3, heads), costs_of(1, heads)[0]
    static = 0.7 * relative(table[None])[0]
    got = kmedoids(
        distance.to(DEVICE), clusters, static=static.to(DEVICE), tie=TIE,
        choices=search.choices(heads, clusters),
    )  # fmt: skip
    want = assign_by_cost(relative(distance) + static, clusters, heads)
    assert torch.equal(got.representatives.cpu(), want)


@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), [(9, 3, 3), (9, 3, 6), (32, 4, 16)])
def test_whole_groups_of_maps(heads, kv_heads, clusters):
    maps, unit = torch.softmax(2 * torch.randn(3, heads, 40), -1), heads // kv_heads
    got = kmedoids(
        maps.to(DEVICE), clusters, from_maps=True, unit=unit, group=unit, tie=TIE,
        choices=search.choices(kv_heads, clusters // unit),
    )  # fmt: skip
    want = assign(maps @ maps.mT, clusters, kv_heads, K_BYTES)
    assert_same_membership(got, Membership.from_representatives(want, clusters, kv_heads), (8, 2))


def test_blended_distances_of_maps():
    maps = torch.softmax(2 * torch.randn(2, 12, 40), -1)
    static = relative(costs_of(1, 12))[0]
    got = kmedoids(
        maps.to(DEVICE), 4, from_maps=True, static=static.to(DEVICE), tie=TIE,
        choices=search.choices(12, 4),
    )  # fmt: skip
    want = assign_by_cost(relative(squared_distances(maps @ maps.mT)) + static, 4, 12)
    assert torch.equal(got.representatives.cpu(), want)


@pytest.mark.parametrize("choices", [0, 1000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_still_gives_heads(choices, bad, monkeypatch):
    """Attention would read memory that is not its own."""
    monkeypatch.setattr(search, "MAX_CHOICES", choices)
    cost = costs_of(2, 9)
    cost[0, 3] = bad
    cost[1] = bad
    for clusters in (1, 4, 9):
        got = kmedoids(cost.to(DEVICE), clusters, tie=TIE, choices=search.choices(9, clusters))
        assert Membership.from_representatives(got.representatives).clusters == clusters


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cannot make 4 clusters of 9 heads, 3 at a time"):
        kmedoids(costs_of(1, 9), 4, unit=3, tie=TIE)
    with pytest.raises(ValueError, match="up to 128 heads"):
        kmedoids(torch.eye(130)[None], 4, tie=TIE)
    with pytest.raises(ValueError, match="are not known"):
        kmedoids(costs_of(1, 9), 4, group=3, tie=TIE)
