"""Probe maps, and the tables of memberships, against the PyTorch that defines them."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from chai_attention.clustering.kmeans import TIE, kmeans
from chai_attention.membership import Membership
from chai_attention.ops.probe import window_gram
from chai_attention.ops.triton import online, probe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLES = ("order", "slot", "value_slot", "slot_heads", "offsets")


@pytest.fixture(autouse=True)
def _nan_memory(nan_memory):
    """Fresh memory holds NaN."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "dim"), [(9, 9, 5, 48), (12, 4, 32, 80), (3, 1, 1, 128)]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_maps(heads, kv_heads, window, dim, softcap, dtype):
    query = torch.randn(2, window + 3, heads, dim, dtype=dtype, device=DEVICE).transpose(1, 2)
    key = torch.randn(2, kv_heads, window + 1, dim, dtype=dtype, device=DEVICE)
    query, key = query[:, :, 2 : window + 2], key[:, :, 1:]
    options = {"scale": 0.2, "softcap": softcap}
    maps = probe.window_maps(query, key, **options)
    want = window_gram(query.cpu(), key.cpu(), **options)
    assert_close((maps @ maps.mT).cpu(), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("clusters", [1, 4, 8, 9])
def test_online_membership(clusters):
    query, key = (2 * torch.randn(3, 9, 16, 32, device=DEVICE) for _ in "qk")
    got = online.cluster_window(query, key, clusters, tie=TIE, scale=0.3, softcap=None)
    gram = window_gram(query.cpu(), key.cpu(), scale=0.3)
    want = Membership.from_representatives(kmeans(gram, clusters))
    assert torch.equal(got.representatives.cpu(), want.representatives)
    assert (got.clusters, got.kv_heads, got.kept_keys) == (clusters, 9, clusters)
    for name in (*TABLES, "key_heads", "value_heads", "key_slot"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
