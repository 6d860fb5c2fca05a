"""Decode with an exact recent window, contiguous and paged, against the definition."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from chai_attention.ops import reference, windowed
from chai_attention.ops.cache_write import write_dense
from chai_attention.ops.rolling_buffer import RollingBuffer
from helpers import random_membership
from op_calls import dispatched, kernels

pytestmark = pytest.mark.usefixtures("nan_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def empty_ring(member, recent, sinks, spare, dim, dtype, first, value_dim=None):
    def memories(removed, dim):
        return (
            torch.full((member.batch, removed, tokens, dim), torch.nan, dtype=dtype)
            for tokens in (recent + spare, sinks)
        )

    positions = first[:, None].int() + torch.arange(sinks, dtype=torch.int32)
    values = member.kv_heads - member.kept_values
    return RollingBuffer(
        *memories(member.kv_heads - member.kept_keys, dim), positions, recent, 0,
        *(memories(values, value_dim) if values else (None, None)),
    )  # fmt: skip


def filled(member, lengths, first, recent, sinks, spare, dim, value_dim, dtype):
    """Caches, ring and the definition's inputs of sequences padded at their left."""
    size, batch = max(lengths) + 3, member.batch
    key = torch.randn(batch, member.kv_heads, size, dim).to(dtype)
    value = torch.randn(batch, member.kv_heads, size, value_dim).to(dtype)
    local = empty_ring(member, recent, sinks, spare, dim, dtype, first, value_dim)
    keys = torch.full((batch, member.kept_keys, size, dim), torch.nan, dtype=dtype)
    values = torch.full((batch, size, member.kept_values, value_dim), torch.nan, dtype=dtype)
    values = values.transpose(1, 2)
    held = {
        name: states for name, states in vars(local).items() if isinstance(states, torch.Tensor)
    }
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        write_dense(
            key[one, :, :length], value[one, :, :length], keys[one], values[one],
            member.select(torch.tensor([row])), torch.zeros(1, dtype=torch.int32),
            replace(local, **{name: states[one] for name, states in held.items()}),
        )  # fmt: skip
    return key, value, keys, values, local


def definition(query, key, value, member, lengths, first, offsets, **options):
    rows = []
    for row, length in enumerate(lengths):
        if not length:
            rows.append(torch.zeros(1, 1, *query.shape[1:2], value.shape[3], dtype=torch.float64))
            continue
        valid = (torch.arange(length) >= first[row])[None]
        states = (x[row : row + 1, :, :length].double() for x in (key, value))
        rows.append(
            reference.recent_attention(
                query[row : row + 1].double(),
                *states,
                member.select(torch.tensor([row])),
                offsets=offsets,
                valid=valid,
                **options,
            )
        )
    return torch.cat(rows)


def moved(local):
    return RollingBuffer(
        local.ring.to(DEVICE), local.sinks.to(DEVICE), local.sink_positions.to(DEVICE),
        local.recent, local.begin,
        *(None if x is None else x.to(DEVICE) for x in (local.value_ring, local.value_sinks)),
    )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(("clusters", "streaming"), [(3, 4), (0, 12)])
def test_streaming_heads_replay_in_a_cuda_graph(clusters, streaming):
    """A step writes and attends; nothing is read on the host, so a replay sees new contents."""
    lengths, dim, dtype = [200, 77], 64, torch.float32
    member = random_membership(12, clusters, 2, streaming=streaming)
    first = torch.tensor([0, 0])
    key, value, keys, values, local = filled(member, lengths, first, 32, 4, 0, dim, dim, dtype)
    query = torch.randn(2, 12, 1, dim)
    on_device = [x.to(DEVICE) for x in (query, key, value, keys, values)]
    there, ring, start = member.to(DEVICE), moved(local), torch.tensor(lengths).to(DEVICE) - 1
    offset = windowed.head_offsets(None, there)
    newest = [torch.stack([x[row, :, n - 1 : n] for row, n in enumerate(lengths)])
              for x in on_device[1:3]]  # fmt: skip

    def step():
        write_dense(*newest, on_device[3], on_device[4], there, start, ring)
        return dispatched.decode_recent(
            on_device[0], on_device[3], on_device[4], there, ring, lengths=(start + 1).int(),
            scale=0.2, offset=offset,
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(2):
        for x in (on_device[0], *newest):
            x.normal_()
        graph.replay()
        for row, n in enumerate(lengths):
            key[row, :, n - 1], value[row, :, n - 1] = (x[row, :, 0].cpu() for x in newest)
        want = definition(
            on_device[0].cpu(), key, value, member, lengths, first, None, recent=32, sinks=4,
            scale=0.2,
        )  # fmt: skip
        assert_close(got.double().cpu(), want, atol=2e-5, rtol=0)


def test_ring_that_begins_anywhere():
    lengths, dim = [40, 40], 32
    member = random_membership(6, 2, 2)
    first = torch.tensor([0, 0])
    query = torch.randn(2, 6, 1, dim)
    key, value, keys, values, local = filled(member, lengths, first, 8, 2, 0, dim, 40, query.dtype)
    want = definition(query, key, value, member, lengths, first, None, recent=8, sinks=2, scale=0.3)
    keys, values = keys[:, :, :40], values[:, :, :40]
    local = RollingBuffer(local.ring.roll(3, 2), local.sinks, local.sink_positions, 8, begin=5)
    mine = dispatched.decode_recent(query, keys, values, member, local, scale=0.3)
    assert_close(mine.double(), want, atol=2e-5, rtol=0)
    got = kernels.decode_recent(
        query.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), member.to(DEVICE),
        RollingBuffer(
            *(x.to(DEVICE) for x in (local.ring, local.sinks, local.sink_positions)), 8, begin=5
        ),
        scale=0.3,
    )  # fmt: skip
    assert_close(got.double().cpu(), want, atol=2e-5, rtol=0)


def test_one_membership_for_all_and_sinks_at_one_place():
    """Tables of one row, and tables whose rows are the same memory."""
    lengths, dim = [40, 9, 25], 32
    member = random_membership(32, 4)
    query, first = torch.randn(3, 32, 1, dim), torch.tensor([0, 0, 0])
    key, value, keys, values, local = filled(
        member.expand(3), lengths, first, 8, 2, 0, dim, dim, query.dtype
    )
    want = definition(
        query, key, value, member.expand(3), lengths, first, None, recent=8, sinks=2, scale=0.3
    )
    positions = torch.arange(2, dtype=torch.int32).expand(3, -1)
    local = RollingBuffer(local.ring, local.sinks, positions, 8)
    options = {"lengths": torch.tensor(lengths), "scale": 0.3}
    assert_close(
        dispatched.decode_recent(query, keys, values, member, local, **options).double(),
        want, atol=2e-5, rtol=0,
    )  # fmt: skip
    on_device = RollingBuffer(
        local.ring.to(DEVICE), local.sinks.to(DEVICE), positions[:1].to(DEVICE).expand(3, -1), 8
    )
    got = kernels.decode_recent(
        query.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), member.to(DEVICE), on_device,
        lengths=options["lengths"].to(DEVICE), scale=0.3,
    )  # fmt: skip
    assert_close(got.double().cpu(), want, atol=2e-5, rtol=0)
