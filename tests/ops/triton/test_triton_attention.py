"""The Triton kernels against the definition: on a GPU if there is one, else interpreted."""

import pytest
import torch
import torch.nn.functional as F

from helpers import clustered_inputs, random_membership

pytest.importorskip("triton")

from chai_attention.ops import reference
from chai_attention.ops.triton.chunks import chunks_of
from op_calls import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _nan_memory(nan_memory):
    """Fresh memory holds NaN."""


def check(
    heads, kv_heads, clusters, queries, size, dim, dtype, batch=2, pad=False, spare=0,
    softcap=None, token_major=True,
):  # fmt: skip
    member = random_membership(heads, clusters, batch, kv_heads).to(DEVICE)
    query = torch.randn(batch, heads, queries, dim, dtype=dtype, device=DEVICE)
    key, value = (torch.randn(batch, kv_heads, size, dim, dtype=dtype, device=DEVICE) for _ in "kv")
    valid = lengths = None
    if pad:
        first = torch.randint(0, size, (batch, 1), device=DEVICE)
        valid = torch.arange(size, device=DEVICE) >= first
    q, k, v = clustered_inputs(member, query, key, value)
    options = {"scale": dim**-0.5, "softcap": softcap, "return_lse": True}
    want, want_lse = reference.clustered_attention(
        q.double(), k.double(), v.double(), member, valid=valid, **options
    )
    if spare:
        lengths = torch.full((batch,), size, device=DEVICE, dtype=torch.int32)
        k, v = (F.pad(x, (0, 0, 0, spare), value=torch.nan) for x in (k, v))
        valid = None if valid is None else F.pad(valid, (0, spare), value=True)
    if token_major:
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
    got, lse = kernels.attention(q, k, v, member, lengths=lengths, valid=valid, **options)
    group = heads // kv_heads
    mask = reference.visible(batch, queries, size, None, None, query.device)
    full = [x.repeat_interleave(group, 1) for x in (key, value)]
    exact = F.scaled_dot_product_attention(
        query.double(), *(x.double() for x in full), attn_mask=mask
    )
    low = F.scaled_dot_product_attention(query, *full, attn_mask=mask)
    loss = (low.double() - exact).abs().max().item()
    error = (got.double() - want).abs().max().item()
    assert error <= 2 * loss + 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters"), [(9, 9, 1), (12, 12, 5), (32, 32, 32), (9, 3, 4), (8, 1, 3)]
)
@pytest.mark.parametrize("size", [1, 63, 129])
def test_decode(heads, kv_heads, clusters, size, dtype):
    check(heads, kv_heads, clusters, 1, size, 48, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters"), [(9, 9, 1), (12, 12, 5), (9, 9, 9), (9, 3, 4)]
)
@pytest.mark.parametrize(("queries", "size"), [(2, 2), (63, 63), (70, 129)])
def test_prefill(heads, kv_heads, clusters, queries, size, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly; runs on a GPU")
    check(heads, kv_heads, clusters, queries, size, 48, dtype)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_head_sizes(queries, dim):
    check(12, 12, 4, queries, 70, dim, torch.float16)


@pytest.mark.parametrize("queries", [1, 33])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("token_major", [False, True])
def test_padding_capacity_softcap_layout(queries, pad, spare, softcap, token_major):
    check(
        9, 9, 4, queries, 600 if queries == 1 else 67, 64, torch.float16,
        batch=3, pad=pad, spare=spare, softcap=softcap, token_major=token_major,
    )  # fmt: skip


def test_head_sizes_of_k_and_v_may_differ():
    member = random_membership(6, 2, 2).to(DEVICE)
    for queries in (1, 9):
        q, k = (torch.randn(2, 2, n, 40, device=DEVICE) for n in (queries, 30))
        v = torch.randn(2, 6, 30, 24, device=DEVICE)
        got, _ = kernels.attention(q, k, v, member, scale=0.2)
        want, _ = reference.clustered_attention(q, k, v, member, scale=0.2)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("members", [1, 2, 4, 8])
def test_chunks_cover_every_head_once(members):
    member = random_membership(12, 5, 4)
    chunks = chunks_of(member, members)
    for b in range(4):
        heads = sorted(h for h in chunks.head[b].flatten().tolist() if h >= 0)
        assert heads == list(range(12))
        for n in range(chunks.count):
            for head, place in zip(chunks.head[b, n], chunks.value[b, n], strict=True):
                if head >= 0:
                    assert member.slot[b, head] == chunks.slot[b, n]
                    assert member.value_slot[b, head] == place
                    assert member.key_slot[b, member.slot[b, head]] == chunks.key[b, n]


def test_what_has_no_kernel_is_refused():
    member = random_membership(4, 2).to(DEVICE)
    q, k, v = (torch.randn(1, n, 3, 8, dtype=torch.float64, device=DEVICE) for n in (2, 2, 4))
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        kernels.attention(q, k, v, member, scale=1.0)
    q, k, v = (torch.randn(1, n, 3, 300, device=DEVICE) for n in (2, 2, 4))
    with pytest.raises(ValueError, match="300 is more than"):
        kernels.attention(q, k, v, member, scale=1.0)
