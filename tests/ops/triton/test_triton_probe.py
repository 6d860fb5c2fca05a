"""Maps of the probe window and distances of outputs against the PyTorch that defines them."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from chai_attention.ops.probe import window_gram, window_output_distances
from chai_attention.ops.triton import probe

pytestmark = pytest.mark.usefixtures("nan_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(9, 9, 5, 48), (12, 4, 32, 80), (3, 1, 1, 128), (4, 2, 33, 256)]
OPTIONS = {"scale": 0.2, "softcap": None}


def window_of(heads: int, kv_heads: int, window: int, dim: int, dtype: torch.dtype):
    """Query, key and value of a window in the middle of longer tensors."""
    query = torch.randn(2, window + 3, heads, dim, dtype=dtype, device=DEVICE).transpose(1, 2)
    key = torch.randn(2, kv_heads, window + 1, dim, dtype=dtype, device=DEVICE)
    value = torch.randn(2, window + 2, kv_heads, dim + 16, dtype=dtype, device=DEVICE)
    value = value.transpose(1, 2)[:, :, 1 : window + 1, :dim]
    return query[:, :, 2 : window + 2], key[:, :, 1:], value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "window", "dim"), SHAPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_maps(heads, kv_heads, window, dim, softcap, dtype):
    query, key, _ = window_of(heads, kv_heads, window, dim, dtype)
    options = {"scale": 0.2, "softcap": softcap}
    maps = probe.window_maps(query, key, **options)
    want = window_gram(query.cpu(), key.cpu(), **options)
    assert_close((maps.double() @ maps.double().mT).cpu().float(), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "window", "dim"), SHAPES)
def test_output_distances(heads, kv_heads, window, dim, dtype):
    query, key, value = window_of(heads, kv_heads, window, dim, dtype)
    got = probe.output_distances(probe.window_maps(query, key, **OPTIONS), value)
    states = (x.cpu().double() for x in (query, key, value))
    want = window_output_distances(*states, **OPTIONS)
    assert_close(got.cpu(), want, atol=1e-4 * float(want.max()), rtol=1e-3)


def test_output_distances_ignore_what_all_values_share():
    query, key, value = window_of(6, 6, 16, 64, torch.float32)
    maps = probe.window_maps(query, key, **OPTIONS)
    shared = 200 * torch.randn(2, 6, 1, 64, device=DEVICE)
    want = window_output_distances(query.cpu(), key.cpu(), value.cpu(), **OPTIONS)
    got = probe.output_distances(maps, value + shared).cpu()
    assert_close(got, want, atol=1e-3 * float(want.max()), rtol=1e-2)


def test_equal_heads_have_no_distance():
    query, key, value = window_of(2, 2, 32, 64, torch.float32)
    query, key = (x[:, :1].expand(-1, 5, -1, -1) for x in (query, key))
    value = value.repeat_interleave(5, dim=1)[:, :5]
    got = probe.output_distances(probe.window_maps(query, key, **OPTIONS), value)
    assert torch.equal(got.cpu(), torch.zeros(2, 5, 5))
