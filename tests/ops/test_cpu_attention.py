"""The reference against the definition, and the CPU implementations against the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chai_attention.membership import Membership
from chai_attention.ops import attention, reference
from chai_attention.ops.blocked import blocked_attention
from chai_attention.ops.dense import torch_attention
from chai_attention.ops.fused import torch_clustered_attention
from helpers import clustered_inputs, definition, random_membership
from op_calls import attend_by


def sdpa_error(query, key, value, scale, valid, dtype):
    """What torch's own attention loses in ``dtype``, full heads, against float64."""
    group = query.shape[1] // key.shape[1]
    queries, size = query.shape[2], key.shape[2]
    mask = reference.visible(query.shape[0], queries, size, None, valid, query.device)
    mask = mask | (torch.arange(size) == 0)  # every row sees a key

    def run(t):
        k, v = (x.to(t).repeat_interleave(group, 1) for x in (key, value))
        return F.scaled_dot_product_attention(query.to(t), k, v, attn_mask=mask, scale=scale)

    return (run(dtype).double() - run(torch.float64)).abs().max().item()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), [(5, 5, 2), (6, 3, 4), (4, 1, 3)])
def test_reference_is_the_definition(heads, kv_heads, clusters, softcap):
    member = random_membership(heads, clusters, 2, kv_heads)
    query = torch.randn(2, heads, 4, 8, dtype=torch.float64)
    key, value = (torch.randn(2, kv_heads, 7, 8, dtype=torch.float64) for _ in "kv")
    valid = torch.arange(7) >= torch.tensor([[0], [2]])
    got, lse = reference.clustered_attention(
        *clustered_inputs(member, query, key, value),
        member,
        scale=0.3,
        valid=valid,
        softcap=softcap,
        return_lse=True,
    )
    want = definition(query, key, value, member.representatives, 0.3, valid, softcap)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert lse.shape == (2, clusters, 4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocked_is_the_reference(data):
    """Any shape, membership, padding, capacity and layout; float32, bfloat16, float16.

    By our blocks alone, and by torch's kernel for what it is made for.
    """
    heads, kv_heads = data.draw(
        st.sampled_from([(1, 1), (9, 9), (12, 12), (32, 32), (52, 52), (9, 3), (12, 2), (8, 1)])
    )
    clusters = data.draw(st.integers(1, heads))
    queries = data.draw(st.sampled_from([1, 2, 8, 9, 63, 129, 257]))
    size = queries + data.draw(st.sampled_from([0, 1, 66, 300]))
    dim = data.draw(st.sampled_from([48, 64, 80]))
    batch = data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    softcap = data.draw(st.sampled_from([None, 20.0]))
    token_major = data.draw(st.booleans())
    spare = data.draw(st.sampled_from([None, 0, 5]))
    attend = data.draw(st.sampled_from([blocked_attention, torch_clustered_attention]))
    torch.manual_seed(data.draw(st.integers(0, 10_000)))

    member = random_membership(heads, clusters, batch, kv_heads)
    query = torch.randn(batch, heads, queries, dim, dtype=dtype)
    key, value = (torch.randn(batch, kv_heads, size, dim, dtype=dtype) for _ in "kv")
    valid = None
    if data.draw(st.booleans()):
        valid = torch.arange(size) >= torch.randint(0, size, (batch, 1))
    inputs = clustered_inputs(member, query, key, value)
    want, want_lse = reference.clustered_attention(
        *(x.double() for x in inputs),
        member,
        scale=dim**-0.5,
        valid=valid,
        softcap=softcap,
        return_lse=True,
    )

    q, k, v = inputs
    lengths = None
    if spare is not None:  # rooms for more tokens hold garbage that must not be seen
        lengths = torch.full((batch,), size)
        k, v = (F.pad(x, (0, 0, 0, spare), value=torch.nan) for x in (k, v))
        valid = None if valid is None else F.pad(valid, (0, spare), value=True)
    if token_major:
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
    got, lse = attend_by(
        attend,
        q,
        k,
        v,
        member,
        scale=dim**-0.5,
        lengths=lengths,
        valid=valid,
        softcap=softcap,
        return_lse=True,
    )
    assert got.dtype == dtype
    loss = sdpa_error(query, key, value, dim**-0.5, None if spare else valid, dtype)
    rounding = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(got.double(), want, atol=2 * loss + rounding, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(("queries", "size"), [(1, 1), (1, 40), (33, 33), (5, 70)])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_is_the_reference(kv_heads, queries, size, padded):
    member = Membership.identity(6, kv_heads, batch=2)
    query = torch.randn(2, 6, queries, 48)
    key, value = (torch.randn(2, kv_heads, size, 48) for _ in "kv")
    valid = torch.arange(size) >= torch.tensor([[0], [size - 1]]) if padded else None
    got, _ = attend_by(torch_attention, query, key, value, member, scale=0.2, valid=valid)
    want, _ = reference.clustered_attention(
        *(x.double() for x in (query, key, value)), member, scale=0.2, valid=valid
    )
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


def test_dense_refuses_clusters():
    member = random_membership(4, 2)
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match="k = H"):
        attend_by(torch_attention, q, k, v, member, scale=1.0)


def test_other_devices_run_the_reference_and_say_so():
    member = random_membership(4, 2)
    q, k, v = (torch.randn(1, n, 3, 8, device="meta") for n in (2, 2, 4))
    with pytest.warns(UserWarning, match="no kernel for device 'meta'"):
        out, _ = attention(q, k, v, member.to("meta"), scale=1.0)
    assert out.shape == (1, 3, 4, 8)
