"""k-means of heads against brute force and scikit-learn, and its rule for ties."""

import itertools

import pytest
import torch
from sklearn.cluster import KMeans

from chai_attention.clustering.kmeans import inertia, kmeans


def features(heads, size=12, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, size, generator=generator, dtype=torch.float64)


def gram_of(points):
    return points @ points.mT


def inertia_by_definition(points, rep):
    """Squared distances to cluster means, from the points themselves."""
    total = 0.0
    for head in set(rep.tolist()):
        members = points[rep == head]
        total += ((members - members.mean(0)) ** 2).sum().item()
    return total


def partitions(count, parts):
    """Labels of every way to split ``count`` points into exactly ``parts`` clusters."""
    for label in itertools.product(range(parts), repeat=count):
        if label[0] == 0 and len(set(label)) == parts:
            yield torch.tensor(label)


@pytest.mark.parametrize("heads", [1, 4, 9])
def test_inertia_is_the_definition_for_any_membership(heads):
    points = features(heads, batch=2, seed=heads)
    for clusters in range(1, heads + 1):
        rep = kmeans(gram_of(points), clusters)
        want = [inertia_by_definition(p, r) for p, r in zip(points, rep, strict=True)]
        assert inertia(gram_of(points), rep).tolist() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_close_to_the_best_partition(seed):
    """Few points: every partition can be tried."""
    points = features(7, size=5, seed=seed)
    for clusters in (2, 3, 5):
        best = min(inertia_by_definition(points[0], label) for label in partitions(7, clusters))
        got = inertia(gram_of(points), kmeans(gram_of(points), clusters)).item()
        assert best - 1e-9 <= got <= 1.15 * best


@pytest.mark.parametrize("clusters", [3, 8, 20])
def test_no_worse_than_scikit_learn(clusters):
    points = features(32, size=40, seed=clusters)
    want = KMeans(clusters, n_init=10, random_state=0).fit(points[0].numpy()).inertia_
    got = inertia(gram_of(points), kmeans(gram_of(points), clusters)).item()
    assert got <= 1.05 * want


def test_finds_groups_that_are_there():
    centres = torch.eye(4, dtype=torch.float64) * 3
    group = torch.tensor([2, 0, 1, 0, 3, 2, 2, 1, 3, 0])
    noise = 0.05 * torch.randn(10, 4, dtype=torch.float64)
    rep = kmeans(gram_of((centres[group] + noise)[None]), 4)[0]
    for a, b in itertools.combinations(range(10), 2):
        assert (rep[a] == rep[b]) == (group[a] == group[b])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [1, 2, 9, 12, 52])
def test_every_number_of_clusters_is_exact(heads, dtype):
    """Also where heads are identical and clusters could run empty."""
    points = features(heads, batch=3, seed=1).to(dtype)
    points[1] = points[1, :1]
    points[2, heads // 2 :] = 0
    for clusters in {1, 2, heads // 2, heads - 1, heads} & set(range(1, heads + 1)):
        rep = kmeans(gram_of(points), clusters)
        assert rep.dtype == torch.int64
        for row in rep:
            assert len(set(row.tolist())) == clusters
            assert torch.equal(row[row], row)


def test_all_heads_kept_is_the_identity():
    assert kmeans(gram_of(features(9)), 9).tolist() == [list(range(9))]


@pytest.mark.parametrize("clusters", [0, 10, -1])
def test_impossible_numbers_are_refused(clusters):
    with pytest.raises(ValueError, match="cannot make"):
        kmeans(gram_of(features(9)), clusters)


def test_the_representative_is_the_medoid():
    points = features(10, seed=4)
    rep = kmeans(gram_of(points), 3)[0]
    for head in set(rep.tolist()):
        members = torch.nonzero(rep == head)[:, 0]
        centre = points[0, members].mean(0)
        distance = ((points[0, members] - centre) ** 2).sum(1)
        assert members[distance.argmin()] == head


def test_equal_costs_go_to_the_lowest_head():
    """Both heads of a pair are equally far from its centre; identical heads are all equal."""
    pair = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 5.0]]])
    assert kmeans(gram_of(pair), 2).tolist() == [[0, 0, 2]]
    assert kmeans(torch.ones(1, 5, 5), 1).tolist() == [[0] * 5]
    assert kmeans(torch.ones(1, 5, 5), 2).tolist() == [[0, 1, 0, 0, 0]]
    assert kmeans(torch.zeros(1, 4, 4), 3).tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize("clusters", [2, 4, 6])
def test_rounding_does_not_change_a_membership(clusters):
    """Pairs of mirrored heads: every pair is an exact tie that noise of 1e-7 would break."""
    base = features(6, size=8, batch=16, seed=7)
    points = torch.cat([base + 0.01, base - 0.01], dim=1)  # heads h and h + 6 are twins
    gram = gram_of(points)
    want = kmeans(gram, clusters)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(gram.shape, generator=generator, dtype=gram.dtype)
        noisy = gram * (1 + 1e-7 * (noise + noise.mT) / 2)
        assert torch.equal(kmeans(noisy, clusters), want)


def test_a_row_does_not_depend_on_its_batch():
    gram = gram_of(features(12, batch=8, seed=3)).float()
    whole = kmeans(gram, 5)
    order = torch.randperm(8)
    assert torch.equal(kmeans(gram[order], 5), whole[order])
    for row in range(8):
        assert torch.equal(kmeans(gram[row : row + 1], 5)[0], whole[row])
