"""An exact recent window over the kernels: they get fewer keys than there are queries."""

import pytest
import torch

from helpers import random_membership

pytest.importorskip("triton")

from chai_attention.ops import reference, windowed
from chai_attention.ops.near import NearKeys
from op_calls import kernels

# the interpreter's way of saying that a sequence without far keys has no largest score
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def _nan_memory(nan_memory):
    """Fresh memory holds NaN."""


def take(states, heads):
    return torch.stack([row[index] for row, index in zip(states, heads, strict=True)])


def check(
    heads, kv_heads, clusters, queries, size, dim, dtype, recent, pad, softcap=None, streaming=0,
    sinks=3,
):  # fmt: skip
    batch = 2
    member = random_membership(heads, clusters, batch, kv_heads, streaming).to(DEVICE)
    query = torch.randn(batch, heads, queries, dim, dtype=dtype, device=DEVICE)
    key, value = (torch.randn(batch, kv_heads, size, dim, dtype=dtype, device=DEVICE) for _ in "kv")
    valid = None
    if pad:
        valid = torch.arange(size, device=DEVICE) >= torch.tensor([[0], [size // 2]], device=DEVICE)
    offsets = torch.randn(heads, heads, device=DEVICE)
    options = {"scale": dim**-0.5, "softcap": softcap}
    want = reference.recent_attention(
        *(x.double() for x in (query, key, value)), member,
        recent=recent, sinks=sinks, offsets=offsets, valid=valid, **options,
    )  # fmt: skip
    tables = windowed.window_tables(size, queries, recent, sinks, valid, query.device)
    band = slice(max(0, size - queries - recent + 1), size)
    real = torch.ones(batch, size, dtype=torch.bool, device=DEVICE) if valid is None else valid
    first = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :sinks]
    near = NearKeys(
        *(
            torch.cat([take(x.transpose(1, 2), first).transpose(1, 2), x[:, :, band]], 2)
            for x in (key, value)
        )
    )
    # V token-major, as the cache holds it
    stored = take(value, member.value_heads).transpose(1, 2).contiguous().transpose(1, 2)
    got = kernels.windowed(
        query, take(key, member.key_heads), stored, member, near, tables,
        offset=windowed.head_offsets(offsets, member), **options,
    )  # fmt: skip
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "streaming", "queries", "size", "recent"),
    [(5, 5, 2, 0, 1, 70, 4), (6, 3, 3, 0, 1, 5, 4), (5, 5, 2, 0, 33, 33, 9),
     (6, 2, 3, 0, 20, 70, 32), (7, 7, 2, 3, 1, 70, 4), (7, 7, 2, 3, 40, 70, 9),
     (6, 2, 2, 3, 33, 33, 5), (6, 2, 1, 5, 1, 40, 8), (5, 5, 0, 5, 37, 60, 4),
     (5, 5, 0, 5, 1, 20, 3), (7, 7, 2, 1, 20, 20, 64)],
)  # fmt: skip
def test_windowed_is_the_reference(
    heads, kv_heads, clusters, streaming, queries, size, recent, pad
):
    check(
        heads, kv_heads, clusters, queries, size, 16, torch.float32, recent, pad,
        streaming=streaming,
    )  # fmt: skip


def test_softcap():
    check(5, 5, 2, 20, 33, 16, torch.float32, 9, True, softcap=3.0)


@pytest.mark.skipif(not CUDA, reason="large shapes need a CUDA GPU")
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(("queries", "size"), [(300, 300), (1, 1000), (257, 900), (700, 720)])
@pytest.mark.parametrize("kv_heads", [12, 4])
def test_large(queries, size, dim, pad, kv_heads):
    """Without padding, multi-head prefill takes the Hopper kernel where there is one."""
    check(12, kv_heads, 3, queries, size, dim, torch.bfloat16, 32, pad)
