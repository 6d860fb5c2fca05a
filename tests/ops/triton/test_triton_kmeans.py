"""The k-means kernel against the k-means it has to reproduce."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.clustering.kmeans import TIE
from chai_attention.clustering.kmeans import kmeans as search
from chai_attention.membership import Membership
from chai_attention.ops.triton.kmeans import kmeans
from membership_checks import assert_same_membership

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def maps_of(batch: int, heads: int, groups: int, spread: float) -> torch.Tensor:
    """Attention maps that fall into ``groups`` kinds, more or less."""
    kinds = torch.randn(batch, groups, 12, 12)
    which = torch.randint(groups, (batch, heads))
    scores = kinds.gather(1, which[:, :, None, None].expand(-1, -1, 12, 12))
    scores = scores + spread * torch.randn(batch, heads, 12, 12)
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), -1).flatten(2)


def gram_of(maps: torch.Tensor) -> torch.Tensor:
    return maps.double() @ maps.double().mT


@pytest.mark.parametrize(
    ("heads", "clusters"), [(9, 1), (9, 4), (9, 8), (12, 5), (32, 4), (32, 17), (52, 6)]
)
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_equals_the_search_in_torch(heads, clusters, spread):
    maps = maps_of(4, heads, max(2, clusters), spread)
    got = kmeans(maps.to(DEVICE), clusters, tie=TIE).representatives
    assert torch.equal(got.cpu(), search(gram_of(maps), clusters))


@pytest.mark.parametrize(
    ("heads", "clusters"), [(1, 1), (2, 1), (9, 4), (32, 5), (52, 51), (20, 20)]
)
def test_tables_are_the_membership_s(heads, clusters):
    maps = torch.randn(3, heads, 20)
    got = kmeans(maps.to(DEVICE), clusters, tie=TIE, members=(8, 3))
    want = Membership.from_representatives(got.representatives.cpu(), clusters)
    assert_same_membership(got, want, (8, 3))


def test_ties_go_to_the_lowest_head():
    # pairs of equal heads: only the tie rule decides who represents whom
    maps = torch.randn(3, 5, 20).repeat_interleave(2, dim=1)
    gram = gram_of(maps)
    for clusters in range(1, 10):
        got = kmeans(maps.to(DEVICE), clusters, tie=TIE).representatives.cpu()
        assert torch.equal(got, search(gram, clusters))
        assert (got.sort(1).values.diff(dim=1) != 0).sum(1).tolist() == [clusters - 1] * 3


@pytest.mark.parametrize("heads", [9, 32])
def test_degenerate_maps(heads):
    """All heads alike, all but one, one far from all: nothing but ties, and no ties at all."""
    alike = torch.randn(1, 1, 20).expand(1, heads, 20)
    but_one = alike.clone()
    but_one[:, 3] += 1
    lone = torch.randn(1, heads, 20)
    lone[:, 5] += 50
    maps = torch.cat([alike, but_one, lone, torch.zeros(1, heads, 20)])
    for clusters in (1, 2, heads // 2, heads - 1):
        got = kmeans(maps.to(DEVICE), clusters, tie=TIE).representatives.cpu()
        assert torch.equal(got, search(gram_of(maps), clusters))


def test_what_is_no_number_still_gives_heads():
    """Attention would read memory that is not its own."""
    maps = torch.randn(2, 9, 20)
    maps[0, 3, 1] = maps[1] = torch.nan
    for clusters in (1, 4, 9):
        got = kmeans(maps.to(DEVICE), clusters, tie=TIE).representatives
        assert Membership.from_representatives(got).clusters == clusters


@pytest.mark.parametrize("members", [(2, 2), (1, 8)])
def test_every_size_of_head_tiles(members):
    got = kmeans(torch.randn(2, 12, 20, device=DEVICE), 5, tie=TIE, members=members)
    want = Membership.from_representatives(got.representatives.cpu())
    assert_same_membership(got, want, members)


def test_every_head_on_its_own():
    maps = maps_of(2, 6, 3, 1.0)
    got = kmeans(maps.to(DEVICE), 6, tie=TIE)
    assert got.representatives.tolist() == [list(range(6))] * 2
    assert got.is_identity


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cannot make 7 clusters of 6 heads"):
        kmeans(maps_of(1, 6, 2, 1.0), 7, tie=TIE)
    with pytest.raises(ValueError, match="up to 128 heads"):
        kmeans(torch.eye(130)[None], 4, tie=TIE)
