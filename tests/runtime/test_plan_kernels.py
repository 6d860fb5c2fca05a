"""A layer's online membership is the same by the kernels and in PyTorch, for every profile."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.ops import online
from chai_attention.ops.probe import HeadClustering
from chai_attention.ops.triton import online as kernels
from chai_attention.runtime.plan import LayerPlan
from membership_checks import assert_same_membership

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = list(
    itertools.product(
        [(9, 9, 4), (12, 4, 6)],
        ["scores", "k-bytes"],
        [None, ("scores", 1.0), ("value", 0.5)],
    )
)


@pytest.fixture
def use_kernels(monkeypatch):
    """Kernels on every device: without a GPU they run in Triton's interpreter."""
    monkeypatch.setattr(online, "_kernels", lambda *states: kernels)


@pytest.mark.parametrize(("shape", "target", "blend"), KINDS, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_kernels_find_what_pytorch_finds(shape, target, blend, softcap, request):
    (heads, kv_heads, clusters), (features, weight) = shape, blend or ("scores", 0.0)
    costs = tuple(map(tuple, torch.rand(heads, heads).tolist())) if blend else None
    plan = LayerPlan(
        0, heads, kv_heads, clusters, 12, target, features=features, blend=weight, costs=costs
    )
    query = 2 * torch.randn(3, 14, heads, 24).transpose(1, 2)[:, :, 1:13]
    key = 2 * torch.randn(3, kv_heads, 12, 24)
    value = torch.randn(3, 15, kv_heads, 24).transpose(1, 2)[:, :, :12]
    want = plan.online_membership(query, key, value, 0.3, softcap)
    request.getfixturevalue("use_kernels")
    states = (x.to(DEVICE) for x in (query, key, value))
    got = plan.online_membership(*states, 0.3, softcap)
    assert_same_membership(got, want)


def test_shapes_without_a_kernel_run_in_pytorch():
    how = HeadClustering(2, 1.0, None, 1e-4, by_means=True)
    assert online.fused_membership(*torch.randn(2, 1, 4, 8, 16), None, how) is None
    window = torch.randn(1, 4, 100, 16)
    assert kernels.fits(window, window)
    assert not kernels.fits(window, window, window)
    assert not kernels.fits(window.double(), window.double())
    assert not kernels.fits(window.expand(1, 4, 100, 16).mT, window.mT)
    assert not kernels.fits(*torch.randn(2, 1, 130, 8, 16))
