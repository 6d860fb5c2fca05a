"""Attention with an exact recent window: the oracle by itself, then the op against it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chai_attention.membership import Membership
from chai_attention.ops import cpu_attention, local, reference, windowed
from helpers import clustered_inputs, definition, random_membership, recent_definition
from op_calls import dispatched


def run(member, query, key, value, *, recent, sinks, scale, offsets=None, valid=None, softcap=None):
    """The op, given what a cache would give it."""
    queries, size = query.shape[2], key.shape[2]
    tables = windowed.window_tables(size, queries, recent, sinks, valid, query.device)
    band = slice(max(0, size - queries - recent + 1), size)
    real = torch.ones(query.shape[0], size, dtype=torch.bool) if valid is None else valid
    first = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :sinks]
    sinks_of = [
        torch.stack([row[:, at] for row, at in zip(x, first, strict=True)]) for x in (key, value)
    ]
    keys = local.LocalKeys(
        torch.cat([sinks_of[0], key[:, :, band]], 2), torch.cat([sinks_of[1], value[:, :, band]], 2)
    )
    _, stored_key, stored_value = clustered_inputs(member, query, key, value)
    offset = windowed.head_offsets(offsets, member)
    return dispatched.windowed(
        query, stored_key, stored_value, member, keys, tables,
        scale=scale, offset=offset, softcap=softcap,
    )  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("recent", "sinks"), [(1, 0), (3, 2), (20, 4)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "streaming"),
    [(5, 5, 2, 0), (6, 3, 4, 0), (5, 5, 2, 2), (6, 3, 2, 3), (5, 5, 0, 5), (6, 3, 0, 6)],
)
def test_reference_is_the_definition(heads, kv_heads, clusters, streaming, recent, sinks, softcap):
    member = random_membership(heads, clusters, 2, kv_heads, streaming)
    query = torch.randn(2, heads, 6, 8, dtype=torch.float64)
    key, value = (torch.randn(2, kv_heads, 9, 8, dtype=torch.float64) for _ in "kv")
    valid = torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 0, 1, 1, 1]]).bool()
    offsets = torch.randn(heads, heads)
    got = reference.recent_attention(
        query, key, value, member, recent=recent, sinks=sinks, scale=0.3,
        offsets=offsets, valid=valid, softcap=softcap,
    )  # fmt: skip
    rep = member.representatives
    want = recent_definition(
        query, key, value, rep, 0.3, recent, sinks, offsets, valid, softcap, member.streaming
    )
    torch.testing.assert_close(got, want, atol=1e-7, rtol=0)
    # a window over everything is attention without clusters
    got = reference.recent_attention(
        query, key, value, member, recent=9, sinks=0, scale=0.3, offsets=offsets, valid=valid
    )
    own = torch.arange(heads).expand(2, heads)
    torch.testing.assert_close(got, definition(query, key, value, own, 0.3, valid))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_windowed_is_the_reference(data):
    """Any shape, membership, padding, window, code; float32, bfloat16; one query or many blocks."""
    heads, kv_heads = data.draw(st.sampled_from([(6, 6), (9, 9), (6, 3), (9, 3), (4, 1)]))
    streaming = data.draw(st.integers(0, heads))
    others = heads - streaming
    clusters = data.draw(st.integers(1, others)) if others else 0
    queries = data.draw(st.sampled_from([1, 2, 5, 33, 63, 128, 129]))
    size = queries + data.draw(st.sampled_from([0, 1, 4, 40, 128]))
    recent = data.draw(st.sampled_from([1, 4, 32, 70]))
    sinks = data.draw(st.sampled_from([0, 1, 4]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    softcap = data.draw(st.sampled_from([None, 4.0]))
    kind = data.draw(st.sampled_from(["none", "left", "holes"]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch = data.draw(st.integers(1, 3))
    member = random_membership(heads, clusters, batch, kv_heads, streaming)
    query = torch.randn(batch, heads, queries, 16).to(dtype)
    key = torch.randn(batch, kv_heads, size, 16).to(dtype)
    width = data.draw(st.sampled_from([16, 24]))
    value = torch.randn(batch, kv_heads, size, width).to(dtype)
    if data.draw(st.booleans()):  # as a model's projections leave them
        query, key, value = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)
        )
    valid = None
    if kind == "left":
        valid = torch.arange(size) >= torch.randint(0, size + 1, (batch, 1))
    elif kind == "holes":
        valid = torch.rand(batch, size) < 0.6
    options = {
        "recent": recent, "sinks": sinks, "scale": 0.4, "softcap": softcap, "valid": valid,
        "offsets": torch.randn(heads, heads) if data.draw(st.booleans()) else None,
    }  # fmt: skip
    with cpu_attention(data.draw(st.sampled_from(["blocked", "torch"]))):
        got = run(member, query, key, value, **options)
    want = reference.recent_attention(*(x.double() for x in (query, key, value)), member, **options)
    assert got.dtype == dtype
    assert got.shape == (batch, queries, heads, width)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


def test_many_blocks_are_worked_on_in_parts(monkeypatch):
    member = random_membership(6, 2, 2, 3)
    query = torch.randn(2, 6, 200, 8)
    key, value = (torch.randn(2, 3, 210, 8) for _ in "kv")
    options = {"recent": 4, "sinks": 2, "scale": 0.4}
    want = run(member, query, key, value, **options)
    monkeypatch.setattr(local, "SCORES", 40_000)
    torch.testing.assert_close(run(member, query, key, value, **options), want)


def test_representatives_of_a_lone_cluster_attend_as_always():
    """A representative's far scores are its own: an offset of it is not used."""
    member = Membership.from_representatives(torch.tensor([0, 0, 2, 0]))
    query, key, value = (torch.randn(1, 4, 50, 8) for _ in "qkv")
    got = run(member, query, key, value, recent=4, sinks=2, scale=0.4, offsets=torch.randn(4, 4))
    own = torch.arange(4)[None]
    want = definition(query, key, value, own, 0.4).float()
    torch.testing.assert_close(got[:, :, [0, 2]], want[:, :, [0, 2]], atol=1e-5, rtol=0)
    assert (got - want)[:, :, [1, 3]].abs().max() > 1e-2


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("heads", "kv_heads", "streaming"), [(6, 6, (1, 4)), (6, 3, (2, 3))])
@pytest.mark.parametrize(("queries", "size"), [(150, 150), (20, 150), (3, 5)])
def test_heads_beside_streaming_ones_see_all_keys_at_once(
    heads, kv_heads, streaming, queries, size, softcap
):
    """Nobody shares, so that a window means nothing to heads that do not stream."""
    member = Membership.from_representatives(
        torch.arange(heads).repeat(2, 1), None, kv_heads, None, streaming
    )
    query = torch.randn(2, heads, queries, 8)
    key, value = (torch.randn(2, kv_heads, size, 8) for _ in "kv")
    options = {"recent": 32, "sinks": 2, "scale": 0.4, "softcap": softcap}
    want = reference.recent_attention(query, key, value, member, **options)
    got = run(member, query, key, value, **options)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
