"""From a window to a membership and its tables, against the PyTorch that defines them."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.clustering.kmeans import TIE, kmeans
from chai_attention.membership import Membership
from chai_attention.ops.probe import HeadClustering, Windows, window_gram
from chai_attention.ops.triton import online
from chai_attention.ops.triton.head_tiles import head_tiles_of
from chai_attention.runtime.plan import LayerPlan
from helpers import random_membership
from membership_checks import assert_same_membership

pytestmark = pytest.mark.usefixtures("nan_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("clusters", [1, 4, 8, 9])
def test_online_membership(clusters):
    query, key = (2 * torch.randn(3, 9, 16, 32, device=DEVICE) for _ in "qk")
    how = HeadClustering(clusters, 0.3, None, TIE, by_means=True)
    got = online.membership_of_window(query, key, None, how)
    gram = window_gram(query.cpu(), key.cpu(), scale=0.3)
    want = Membership.from_representatives(kmeans(gram, clusters))
    assert_same_membership(got, want, (8, 2))


@pytest.mark.parametrize("clusters", [1, 5, 12])
def test_grouped_queries(clusters):
    """Single heads are clustered: how many K/V heads they read is counted."""
    query, key = 2 * torch.randn(3, 12, 16, 32), 2 * torch.randn(3, 4, 16, 32)
    how = HeadClustering(clusters, 0.3, None, TIE, by_means=True)
    got = online.membership_of_window(query.to(DEVICE), key.to(DEVICE), None, how)
    want = kmeans(window_gram(query, key, scale=0.3), clusters)
    want = Membership.from_representatives(want, kv_heads=4)
    assert_same_membership(got, want)


@pytest.mark.parametrize(("heads", "clusters", "batch"), [(1, 1, 1), (9, 4, 3), (64, 9, 33)])
def test_list_of_used_head_tiles(heads, clusters, batch):
    head_tiles = head_tiles_of(random_membership(heads, clusters, batch).to(DEVICE), 2)
    work, count = head_tiles.used
    idle = head_tiles.slot.flatten() < 0
    assert work.tolist() == idle.int().sort(stable=True).indices.tolist()
    assert count.tolist() == [int((~idle).sum())]


@pytest.mark.parametrize("kind", ["means", "medoids", "value", "groups"])
@pytest.mark.parametrize("streaming", [(), (1, 6)])
def test_windows_among_packed_tokens(kind, streaming):
    """Nothing is gathered, whatever the windows hold: the answer is that for each by itself."""
    heads, groups, window, dim = 8, 4 if kind == "groups" else 8, 6, 32
    streaming = (2, 3) if streaming and kind == "groups" else streaming
    table = tuple(map(tuple, torch.rand(heads, heads).tolist()))
    plan = LayerPlan(
        0, heads, groups, 4, window, "k-bytes" if kind == "groups" else "scores",
        features="value" if kind == "value" else "scores", blend=0.5,
        costs=None if kind == "means" else table, recent=4 if streaming else 0, streaming=streaming,
    )  # fmt: skip
    query, key, value = (2 * torch.randn(40, n, dim) for n in (heads, groups, groups))
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8], [20, 21, 22, 22, 22, 22], [30, 31, 32, 33, 34, 34]])
    count = torch.tensor([6, 3, 5], dtype=torch.int32)
    arguments = (query, key, value, tokens, count, 0.3, None)
    want = plan.packed_representatives(*arguments)  # in PyTorch
    assert want.shape == (3, heads - len(streaming))
    for row in range(3):
        one = tokens[row : row + 1], count[row : row + 1]
        assert torch.equal(
            plan.packed_representatives(*arguments[:3], *one, 0.3, None)[0], want[row]
        )
    far = plan._far if streaming else plan
    on_device = [x.to(DEVICE) for x in (query, key, tokens, count)]
    chosen = torch.tensor(plan.clustered, device=DEVICE) if streaming else None
    values = plan._far_values(value[tokens].transpose(1, 2)).to(DEVICE) if kind == "value" else None
    how = far._clustering(torch.device(DEVICE), 0.3, None)
    assert how.by_means == (kind == "means")
    windows = Windows(*on_device[2:], chosen)
    got = online.representatives(*on_device[:2], values, windows, how)
    assert torch.equal(got.cpu(), want)
