"""Error curves and the choice at their elbow."""

import pytest
import torch

from chai_attention.clustering.elbow import cluster_counts, elbow, error_curve


def grouped_points(groups, noise, size=16, seed=0):
    """Heads in clear groups, ``groups[i]`` heads in group i."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(len(groups), size, generator=generator, dtype=torch.float64) * 4
    index = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    spread = torch.randn(len(index), size, generator=generator, dtype=torch.float64)
    return centres[index] + noise * spread


def gram_of(points):
    return points @ points.mT


@pytest.mark.parametrize(
    ("heads", "kv_heads", "target", "want"),
    [
        (4, 4, "scores", [1, 2, 3, 4]),
        (6, 2, "scores", [1, 2, 3, 4, 5, 6]),
        (6, 2, "k-bytes", [3, 6]),
        (9, 3, "k-bytes", [3, 6, 9]),
    ],
)
def test_numbers_a_layer_can_have(heads, kv_heads, target, want):
    assert cluster_counts(heads, kv_heads, target) == want


@pytest.mark.parametrize(("kv_heads", "target"), [(12, "scores"), (4, "scores"), (4, "k-bytes")])
def test_a_curve_falls_from_one_to_zero(kv_heads, target):
    points = torch.rand(12, 30, dtype=torch.float64)
    curve = error_curve(gram_of(points), kv_heads, target)
    assert len(curve) == len(cluster_counts(12, kv_heads, target))
    assert curve[0] == 1
    assert curve[-1] == pytest.approx(0, abs=1e-9)
    assert curve == sorted(curve, reverse=True)


def test_the_curve_is_the_share_of_the_spread_that_is_left():
    points = torch.rand(6, 10, dtype=torch.float64)
    curve = error_curve(gram_of(points), 6, "scores")
    spread = ((points - points.mean(0)) ** 2).sum()
    closest = torch.cdist(points, points).fill_diagonal_(torch.inf).min()
    # five clusters of six heads: the one pair that is merged is the closest one
    assert curve[4] == pytest.approx((closest**2 / 2 / spread).item())


def test_identical_heads_have_no_error_and_need_one_cluster():
    curve = error_curve(torch.ones(5, 5), 5, "scores")
    assert curve == [0.0] * 5
    assert elbow([1, 2, 3, 4, 5], curve) == 1


@pytest.mark.parametrize("groups", [[4, 4, 4, 4], [8, 3, 3, 2], [6, 5, 5]])
def test_the_elbow_is_where_the_groups_are(groups):
    points = grouped_points(groups, noise=0.02)
    counts = cluster_counts(16, 16, "scores")
    chosen = elbow(counts, error_curve(gram_of(points), 16, "scores"))
    assert abs(chosen - len(groups)) <= 1


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.02, 0.0])
def test_never_more_error_than_allowed(bound):
    points = grouped_points([6, 5, 5], noise=0.4)
    counts = cluster_counts(16, 16, "scores")
    curve = error_curve(gram_of(points), 16, "scores")
    chosen = elbow(counts, curve, bound)
    assert curve[chosen - 1] <= bound + 1e-12
    assert chosen >= elbow(counts, curve)


def test_a_straight_curve_has_no_elbow_and_keeps_all_heads():
    counts = list(range(1, 9))
    assert elbow(counts, [1 - i / 7 for i in range(8)]) == 8


def test_a_curve_of_three_points():
    """Three K/V heads, as SmolLM2 has."""
    assert elbow([3, 6, 9], [1.0, 0.1, 0.0]) == 6
    assert elbow([3, 6, 9], [1.0, 0.5, 0.0]) == 9
    assert elbow([3, 6, 9], [1.0, 0.9, 0.0]) == 9
    assert elbow([3, 6, 9], [1.0, 0.1, 0.0], max_error=0.05) == 9


def test_curves_of_one_and_two_points():
    assert elbow([4], [0.0]) == 4
    assert elbow([2, 4], [1.0, 0.0]) == 4
