"""From a window to a membership and its tables, against the PyTorch that defines them."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.clustering.kmeans import TIE, kmeans
from chai_attention.membership import Membership
from chai_attention.ops.probe import window_gram
from chai_attention.ops.triton import online
from chai_attention.ops.triton.chunks import chunks_of
from helpers import random_membership
from membership_checks import assert_same_membership

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _nan_memory(nan_memory):
    """Fresh memory holds NaN."""


@pytest.mark.parametrize("clusters", [1, 4, 8, 9])
def test_online_membership(clusters):
    query, key = (2 * torch.randn(3, 9, 16, 32, device=DEVICE) for _ in "qk")
    got = online.cluster_window(query, key, clusters, tie=TIE, scale=0.3, softcap=None)
    gram = window_gram(query.cpu(), key.cpu(), scale=0.3)
    want = Membership.from_representatives(kmeans(gram, clusters))
    assert_same_membership(got, want, (8, 2))


@pytest.mark.parametrize("clusters", [1, 5, 12])
def test_grouped_queries(clusters):
    """Single heads are clustered: how many K/V heads they read is counted."""
    query, key = 2 * torch.randn(3, 12, 16, 32), 2 * torch.randn(3, 4, 16, 32)
    got = online.cluster_window(
        query.to(DEVICE), key.to(DEVICE), clusters, tie=TIE, scale=0.3, softcap=None
    )
    want = kmeans(window_gram(query, key, scale=0.3), clusters)
    want = Membership.from_representatives(want, kv_heads=4)
    assert_same_membership(got, want)


@pytest.mark.parametrize(("heads", "clusters", "batch"), [(1, 1, 1), (9, 4, 3), (64, 9, 33)])
def test_list_of_used_chunks(heads, clusters, batch):
    chunks = chunks_of(random_membership(heads, clusters, batch).to(DEVICE), 2)
    work, count = chunks.used
    idle = chunks.slot.flatten() < 0
    assert work.tolist() == idle.int().sort(stable=True).indices.tolist()
    assert count.tolist() == [int((~idle).sum())]
