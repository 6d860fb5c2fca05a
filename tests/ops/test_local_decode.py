"""Decode with an exact window over rings, on the CPU, against the definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chai_attention.ops import cpu_attention, reference, windowed
from chai_attention.ops.dispatch import REFERENCE
from chai_attention.ops.rolling_buffer import RollingBuffer
from helpers import clustered_inputs, random_membership
from op_calls import Operations, dispatched


def ring_of(states, heads, positions, recent, size, begin, room):
    """Ring and sinks of ``heads [B, n]`` of ``states [B, G, S, D]``; what is not held is NaN."""
    picked = states.gather(1, heads[:, :, None, None].expand(-1, -1, *states.shape[2:]))
    ring = torch.full((*picked.shape[:2], room, picked.shape[3]), torch.nan).to(states)
    for position in range(max(0, size - room), size):
        ring[:, :, (position - begin) % room] = picked[:, :, position]
    index = positions.clamp(0, size - 1)[:, None, :, None]
    return ring, picked.gather(2, index.long().expand(*picked.shape[:2], -1, picked.shape[3]))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_decode_over_rings_is_the_definition(data):
    """Any membership, streaming heads, padding, ring size and place; float32 and bfloat16."""
    heads, kv_heads = data.draw(st.sampled_from([(6, 6), (9, 9), (6, 3), (9, 3), (4, 1)]))
    streaming = data.draw(st.integers(0, heads))
    others = heads - streaming
    clusters = data.draw(st.integers(1, others)) if others else 0
    size = data.draw(st.sampled_from([1, 3, 30, 129, 700]))
    recent = data.draw(st.sampled_from([1, 4, 32, 70]))
    sinks = data.draw(st.sampled_from([0, 1, 4]))
    spare = data.draw(st.sampled_from([0, 3]))
    begin = data.draw(st.sampled_from([0, 5]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    softcap = data.draw(st.sampled_from([None, 4.0]))
    kind = data.draw(st.sampled_from(["none", "left", "holes"]))
    whole = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch = data.draw(st.integers(1, 3))
    member = random_membership(heads, clusters, batch, kv_heads, streaming)
    query = torch.randn(batch, heads, 1, 16).to(dtype)
    key = torch.randn(batch, kv_heads, size, 16).to(dtype)
    value = torch.randn(batch, kv_heads, size, data.draw(st.sampled_from([16, 24]))).to(dtype)
    valid = None
    if kind == "left":
        valid = torch.arange(size) >= torch.randint(0, size + 1, (batch, 1))
    elif kind == "holes":
        valid = torch.rand(batch, size) < 0.6
    real = torch.ones(batch, size, dtype=torch.bool) if valid is None else valid
    positions = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :sinks]
    positions = torch.where(real.gather(1, positions), positions, -1)
    room = recent + spare
    memories = [
        ring_of(x, removed, positions, recent, size, begin, room)
        for x, removed in ((key, member.removed_key_heads), (value, member.removed_value_heads))
    ]
    values = memories[1] if member.removed_value_heads.shape[1] else (None, None)
    local = RollingBuffer(*memories[0], positions.int(), recent, begin, *values)
    offsets = torch.randn(heads, heads) if data.draw(st.booleans()) else None
    offset = windowed.head_offsets(offsets, member)
    options = {"scale": 0.4, "softcap": softcap, "valid": valid}
    want = reference.recent_attention(
        *(x.double() for x in (query, key, value)), member, recent=recent, sinks=sinks,
        offsets=offsets, **options,
    )  # fmt: skip
    _, stored_key, stored_value = clustered_inputs(member, query, key, value)
    if not whole:  # capacity for more tokens, which holds anything
        stored_key, stored_value = (
            torch.nn.functional.pad(x, (0, 0, 0, 5), value=torch.nan)
            for x in (stored_key, stored_value)
        )
        options["lengths"] = torch.full((batch,), size, dtype=torch.int32)
        if valid is not None:
            options["valid"] = torch.nn.functional.pad(valid, (0, 5), value=True)
    # the readable one reads what no memory holds, too, though for no use
    runs = [dispatched] if spare or not whole else [dispatched, Operations(REFERENCE)]
    for run in runs:
        with cpu_attention(data.draw(st.sampled_from(["blocked", "torch"]))):
            got = run.decode_recent(
                query, stored_key, stored_value, member, local,
                offset=offset, **options,
            )  # fmt: skip
        assert got.dtype == dtype
        tolerance = 2e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


def test_an_offset_is_for_far_keys_even_of_a_representative():
    member = random_membership(4, 2, 1)
    query, key, value = (torch.randn(1, 4, tokens, 8) for tokens in (1, 30, 30))
    positions = torch.arange(2)[None]
    ring, sinks = ring_of(key, member.removed_key_heads, positions, 5, 30, 0, 5)
    local = RollingBuffer(ring, sinks, positions.int(), 5)
    _, *stored = clustered_inputs(member, query, key, value)
    options = {"scale": 0.4, "offset": torch.randn(1, 4)}
    want = Operations(REFERENCE).decode_recent(query, *stored, member, local, **options)
    for code in ("blocked", "torch"):
        with cpu_attention(code):
            got = dispatched.decode_recent(query, *stored, member, local, **options)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
