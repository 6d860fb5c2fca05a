"""The Hopper kernel with an exact window against the definition, on a GPU."""

import logging

import pytest
import torch

from helpers import random_membership

pytest.importorskip("triton")

from chai_attention.ops import reference, windowed
from chai_attention.ops.local import LocalKeys
from op_calls import dispatched

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU: its instructions have no interpreter",
    ),
]


def take(states, heads):
    index = heads[:, :, None, None].expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)


def case(
    heads, clusters, streaming, queries, size, recent, sinks=4, dim=128, kv_heads=None, batch=2,
    dtype=torch.bfloat16, offsets=True,
):  # fmt: skip
    """A call of `windowed_attention` and what it should give."""
    kv_heads = kv_heads or heads
    member = random_membership(heads, clusters, batch, kv_heads, streaming).to("cuda")
    query = torch.randn(batch, heads, queries, dim, dtype=dtype, device="cuda")
    key, value = (torch.randn(batch, kv_heads, size, dim, dtype=dtype, device="cuda") for _ in "kv")
    table = torch.randn(heads, heads, device="cuda") if offsets else None
    tables = windowed.window_tables(size, queries, recent, sinks, None, query.device)
    first = max(0, size - queries - recent + 1)
    local = LocalKeys(
        *(torch.cat([x[:, :, : tables.sinks], x[:, :, first:]], 2) for x in (key, value))
    )
    keys = take(key, member.key_heads)
    values = take(value, member.value_heads).transpose(1, 2).contiguous().transpose(1, 2)
    offset = windowed.head_offsets(table, member)

    def call():
        return dispatched.windowed(
            query, keys, values, member, local, tables, scale=dim**-0.5, offset=offset
        )

    def want():
        return reference.recent_attention(
            *(x.double() for x in (query, key, value)), member,
            recent=recent, sinks=sinks, offsets=table, scale=dim**-0.5,
        )  # fmt: skip

    return call, want


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "clusters", "streaming", "queries", "size", "recent", "sinks"),
    [(12, 5, 0, 300, 300, 32, 4), (12, 3, 4, 300, 300, 128, 4), (12, 3, 4, 129, 700, 128, 0),
     (12, 0, 12, 257, 257, 64, 16), (12, 8, 4, 200, 500, 1, 1), (12, 2, 5, 65, 65, 512, 4),
     (12, 2, 5, 700, 700, 512, 4), (32, 8, 12, 1000, 1000, 100, 4), (6, 3, 2, 128, 140, 13, 3),
     (12, 3, 4, 65, 66, 5, 7)],
)  # fmt: skip
def test_window(heads, clusters, streaming, queries, size, recent, sinks, dtype, caplog):
    with caplog.at_level(logging.DEBUG, "chai_attention"):
        call, want = case(heads, clusters, streaming, queries, size, recent, sinks, dtype=dtype)
        got = call()
    assert "Hopper prefill kernel with a window" in caplog.text
    torch.testing.assert_close(got.double(), want(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("kv_heads", "clusters", "streaming"), [(4, 3, 5), (4, 2, 0), (2, 1, 9), (4, 0, 12)]
)
def test_grouped_queries(kv_heads, clusters, streaming, dim):
    call, want = case(12, clusters, streaming, 300, 500, 70, dim=dim, kv_heads=kv_heads)
    torch.testing.assert_close(call().double(), want(), atol=2e-2, rtol=0)


@pytest.mark.parametrize(("clusters", "streaming"), [(2, 0), (3, 4), (0, 12), (7, 5)])
def test_head_size_64(clusters, streaming):
    call, want = case(12, clusters, streaming, 333, 400, 40, dim=64, offsets=False, batch=3)
    torch.testing.assert_close(call().double(), want(), atol=2e-2, rtol=0)


def test_repeats_are_equal_to_the_bit_and_replay():
    call, want = case(16, 4, 5, 1500, 1500, 128, batch=4)
    first = call()
    torch.testing.assert_close(first.double(), want(), atol=2e-2, rtol=0)
    for _ in range(20):
        assert torch.equal(first, call())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(first, out)
