"""The Hopper prefill kernel against the definition, and random cases of all kernels, on a GPU."""

import logging

import pytest
import torch
import torch.nn.functional as F

from helpers import clustered_inputs, random_membership
from packed_cases import packed_case

pytest.importorskip("triton")

from chai_attention.ops import reference
from op_calls import dispatched, kernels

hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU: its instructions have no interpreter",
)
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check(
    heads, clusters, queries, size, dim, dtype, batch, spare=0, return_lse=True, kv_heads=None,
    token_major=True,
):  # fmt: skip
    """Compare with the definition in float64; spare room behind K and V."""
    kv_heads = kv_heads or heads
    member = random_membership(heads, clusters, batch, kv_heads).to("cuda")
    query = torch.randn(batch, heads, queries, dim, dtype=dtype, device="cuda")
    key, value = (torch.randn(batch, kv_heads, size, dim, dtype=dtype, device="cuda") for _ in "kv")
    q, k, v = clustered_inputs(member, query, key, value)
    options = {"scale": dim**-0.5, "return_lse": return_lse}
    want, want_lse = reference.clustered_attention(
        q.double(), k.double(), v.double(), member, **options
    )
    k = F.pad(k, (0, 0, 0, spare), value=torch.nan)[:, :, :size]
    v = F.pad(v, (0, 0, 0, spare), value=torch.nan)
    if token_major:
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
    got, lse = kernels.attention(q, k, v[:, :, :size], member, **options)
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    mask = reference.visible(batch, queries, size, None, None, query.device)
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask
    )
    low = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    loss = (low.double() - exact).abs().max().item()
    error = (got.double() - want).abs().max().item()
    assert error <= 2 * loss + 4 * torch.finfo(dtype).eps
    if return_lse:
        torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=1e-3)


@hopper_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "heads", "clusters"), [(128, 12, 5), (128, 32, 4), (64, 12, 2)])
@pytest.mark.parametrize(
    ("queries", "size"), [(65, 65), (128, 128), (129, 129), (70, 200), (300, 1000)]
)
def test_hopper(dim, heads, clusters, queries, size, dtype, caplog):
    with caplog.at_level(logging.DEBUG, "chai_attention"):
        check(heads, clusters, queries, size, dim, dtype, batch=3, spare=7)
    assert "Hopper prefill kernel" in caplog.text


@hopper_only
@pytest.mark.parametrize("token_major", [False, True])
def test_grouped_queries(token_major, caplog):
    with caplog.at_level(logging.DEBUG, "chai_attention"):
        check(32, 6, 200, 500, 128, torch.bfloat16, batch=2, kv_heads=8, token_major=token_major)
    assert "Hopper prefill kernel" in caplog.text


@hopper_only
@pytest.mark.parametrize("page", [16, 48, 64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_pages(page, dim):
    """Pages out of order, of which the last hold NaN behind the end; one sequence has no key."""
    member = random_membership(12, 4, 3)
    case = packed_case(
        member, [200, 70, 1], [0, 333, 0], page, dim, dim, torch.bfloat16, "cuda", True, tail=5
    )
    lengths = case.caches.lengths.clone()
    lengths[2] = 0
    pages = (case.caches.keys, case.caches.values, case.caches.table)
    options = {"most_queries": 200, "scale": dim**-0.5, "return_lse": True}
    out, lse = dispatched.paged_prefill(
        case.query, *pages, member.to("cuda"), query_starts=case.starts, lengths=lengths, **options
    )
    want, want_lse = dispatched.paged_prefill(
        case.query.double().cpu(), *(x.cpu().double() for x in pages[:2]), pages[2].cpu(), member,
        query_starts=case.starts.cpu(), lengths=lengths.cpu(), **options,
    )  # fmt: skip
    torch.testing.assert_close(out[:271].double().cpu(), want[:271], atol=3e-2, rtol=0)
    torch.testing.assert_close(lse[:271].cpu(), want_lse[:271], atol=2e-3, rtol=1e-3)


@hopper_only
def test_repeats_are_equal_to_the_bit():
    member = random_membership(16, 4, 4).to("cuda")
    q, k = (torch.randn(4, 4, 1500, 128, dtype=torch.bfloat16, device="cuda") for _ in "qk")
    v = torch.randn(4, 1500, 16, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    first, _ = kernels.attention(q, k, v, member, scale=0.1)
    for _ in range(20):
        again, _ = kernels.attention(q, k, v, member, scale=0.1)
        assert torch.equal(first, again)


@gpu_only
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_random_cases(decode):
    draw = torch.Generator().manual_seed(1)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=draw))

    for _ in range(200):
        heads = (8, 12, 32)[number(0, 2)]
        size = number(1, 700)
        check(
            heads, number(1, heads), 1 if decode else number(1, size), size, 128,
            torch.bfloat16, batch=number(1, 4), spare=number(0, 9), return_lse=False,
        )  # fmt: skip


@gpu_only
@pytest.mark.parametrize("queries", [1, 130])
def test_replays_in_a_cuda_graph(queries):
    member = random_membership(12, 4, 2).to("cuda")
    q, k = (torch.randn(2, 4, n, 128, dtype=torch.float16, device="cuda") for n in (queries, 300))
    v = torch.randn(2, 300, 12, 128, dtype=torch.float16, device="cuda").transpose(1, 2)
    kernels.attention(q, k, v, member, scale=0.1)  # compiles, and makes the membership's tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = kernels.attention(q, k, v, member, scale=0.1)
    for _ in range(3):
        q.normal_()
        out.fill_(torch.nan)
        graph.replay()
        want, _ = reference.clustered_attention(
            q.double(), k.double(), v.double(), member, scale=0.1
        )
        torch.testing.assert_close(out.double(), want, atol=2e-3, rtol=2e-2)
