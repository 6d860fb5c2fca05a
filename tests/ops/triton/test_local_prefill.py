"""The exact recent window's kernel against the definition, on a GPU if there is one."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.ops import AttentionCall, reference, windowed
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.triton import local_prefill
from helpers import TOLERANCE, random_membership

pytestmark = pytest.mark.usefixtures("nan_memory")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies bfloat16 wrongly


def take(states, heads):
    return torch.stack([row[index] for row, index in zip(states, heads, strict=True)])


def check(
    heads, kv_heads, clusters, queries, size, dim, dtype, recent, sinks=3, pad="none",
    softcap=None, value_dim=None, offsets=True,
):  # fmt: skip
    batch = 2
    member = random_membership(heads, clusters, batch, kv_heads).to(DEVICE)
    query = torch.randn(batch, heads, queries, dim, dtype=dtype, device=DEVICE)
    key = torch.randn(batch, kv_heads, size, dim, dtype=dtype, device=DEVICE)
    value = torch.randn(batch, kv_heads, size, value_dim or dim, dtype=dtype, device=DEVICE)
    valid = None
    if pad == "left":
        valid = torch.arange(size, device=DEVICE) >= torch.tensor([[0], [size // 2]], device=DEVICE)
    elif pad == "holes":
        valid = torch.rand(batch, size, device=DEVICE) < 0.6
    elif pad == "nothing":  # a sequence of padding alone
        valid = torch.ones(batch, size, dtype=torch.bool, device=DEVICE)
        valid[1] = False
    table = torch.randn(heads, heads, device=DEVICE) if offsets else None
    options = {"scale": dim**-0.5, "softcap": softcap}
    want = reference.recent_attention(
        *(x.double() for x in (query, key, value)), member,
        recent=recent, sinks=sinks, offsets=table, valid=valid, **options,
    )  # fmt: skip
    tables = windowed.window_tables(size, queries, recent, sinks, valid, query.device)
    real = torch.ones(batch, size, dtype=torch.bool, device=DEVICE) if valid is None else valid
    first = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :sinks]
    band = slice(max(0, size - queries - recent + 1), size)
    local = LocalKeys(
        *(
            torch.cat([take(x.transpose(1, 2), first).transpose(1, 2), x[:, :, band]], 2)
            for x in (key, value)
        )
    )
    far = None
    if tables.far is not None:
        keys = take(key, member.key_heads)[:, :, tables.far]
        late = take(query, member.slot_heads)[:, :, max(0, queries - keys.shape[2]) :]
        far = reference.clustered_attention(
            late, keys, take(value, member.value_heads)[:, :, tables.far], member,
            valid=tables.far_valid, return_lse=True, **options,
        )  # fmt: skip
    offset = None if table is None else windowed.head_offsets(table, member)
    call = AttentionCall(member, offset=offset, **options)
    got = local_prefill.merge_local(query, local, tables, far, call)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("pad", ["none", "left", "holes", "nothing"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "queries", "size", "recent"),
    [(5, 5, 2, 1, 70, 4), (6, 3, 3, 5, 9, 4), (5, 5, 2, 63, 63, 9), (6, 2, 3, 129, 200, 32),
     (9, 9, 4, 40, 40, 70), (4, 1, 2, 3, 150, 1)],
)  # fmt: skip
def test_local_and_far_are_the_reference(heads, kv_heads, clusters, queries, size, recent, pad):
    check(heads, kv_heads, clusters, queries, size, 16, torch.float32, recent, pad=pad)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(48, 48), (64, 40), (80, 80), (96, 96), (128, 128)])
def test_head_sizes(dim, value_dim, dtype):
    check(6, 6, 2, 33, 90, dim, dtype, 20, value_dim=value_dim)


@pytest.mark.parametrize("sinks", [0, 1, 20])
@pytest.mark.parametrize("offsets", [False, True])
def test_sinks_offsets_softcap(sinks, offsets):
    check(4, 4, 2, 30, 60, 32, torch.float32, 9, sinks=sinks, offsets=offsets, softcap=3.0)


@pytest.mark.skipif(not CUDA, reason="large shapes need a CUDA GPU")
@pytest.mark.parametrize("pad", ["none", "left", "holes"])
@pytest.mark.parametrize(("kv_heads", "dim"), [(32, 128), (8, 64)])
@pytest.mark.parametrize(("queries", "size", "recent"), [(700, 700, 32), (257, 1000, 128)])
def test_large(queries, size, recent, kv_heads, dim, pad):
    check(32, kv_heads, 4, queries, size, dim, torch.bfloat16, recent, pad=pad)
