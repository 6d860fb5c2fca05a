"""The cache write against indexing, on a GPU if there is one, else interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.errors import AttentionInputError
from chai_attention.ops import cache_write
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.triton import write
from helpers import clustered_inputs, random_membership
from page_writes import launch_paged, write_paged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(9, 9, 4), (12, 12, 12), (9, 3, 2)]
STREAMING = [(9, 9, 4, 0), (12, 12, 12, 0), (9, 3, 2, 0), (9, 9, 3, 4), (9, 3, 1, 7), (4, 4, 0, 4)]


def same(got, want):
    assert torch.equal(torch.nan_to_num(got, 7e7).cpu(), torch.nan_to_num(want, 7e7).cpu())


def ring(rows, removed, recent, sinks, dim, first, begin=0, removed_values=0, value_dim=0):
    def memories(heads, dim):
        return (torch.full((rows, heads, tokens, dim), torch.nan) for tokens in (recent, sinks))

    return RollingBuffer(
        *memories(removed, dim), (first[:, None] + torch.arange(sinks)).int(), recent, begin,
        *(memories(removed_values, value_dim) if removed_values else (None, None)),
    )  # fmt: skip


def on_device(local):
    return RollingBuffer(
        local.ring.to(DEVICE), local.sinks.to(DEVICE), local.sink_positions.to(DEVICE),
        local.recent, local.begin,
        *(None if x is None else x.to(DEVICE) for x in (local.value_ring, local.value_sinks)),
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "streaming"), STREAMING)
@pytest.mark.parametrize("dim", [48, 64])
def test_new_tokens_go_to_their_places(tokens, heads, kv_heads, clusters, streaming, dim):
    batch, size = 3, 90
    member = random_membership(heads, clusters, batch, kv_heads, streaming)
    new_key = torch.randn(batch, kv_heads, tokens, dim)
    new_value = torch.randn(batch, tokens, kv_heads, 40).transpose(1, 2)
    start = torch.tensor([0, 7, size - tokens])
    first = torch.tensor([0, 9, 200])
    query = torch.zeros(batch, heads, 1, dim)
    _, want_key, want_value = clustered_inputs(member, query, new_key, new_value)
    for function, device in ((write.write_dense, DEVICE), (cache_write.write_dense, "cpu")):
        keys = torch.full((batch, member.kept_keys, size, dim), torch.nan, device=device)
        shape = (batch, size, member.kept_values, 40)
        values = torch.full(shape, torch.nan, device=device).transpose(1, 2)
        local = ring(
            batch, kv_heads - member.kept_keys, 8, 3, dim, first, 11,
            kv_heads - member.kept_values, 40,
        )  # fmt: skip
        local = local if device == "cpu" else on_device(local)
        function(
            new_key.to(device), new_value.to(device), keys, values, member.to(device),
            start.to(device), local,
        )  # fmt: skip
        for row, begin in enumerate(start.tolist()):
            for cache, want in ((keys[row], want_key[row]), (values[row], want_value[row])):
                assert torch.equal(cache[:, begin : begin + tokens].cpu(), want)
                cache[:, begin : begin + tokens] = torch.nan
                assert cache.isnan().all()  # and nothing else was touched
            absent = (
                new_key[row, member.removed_key_heads[row]],
                new_value[row, member.removed_value_heads[row]],
            )
            for removed, (held, firsts) in zip(absent, local.memories, strict=False):
                last = torch.full(held[row].shape, torch.nan)
                for token in range(max(0, tokens - 8), tokens):
                    last[:, (begin + token - 11) % 8] = removed[:, token]
                same(held[row], last)
                sinks = torch.full(firsts[row].shape, torch.nan)
                for index in range(3):
                    token = int(first[row]) + index - begin
                    if 0 <= token < tokens:
                        sinks[:, index] = removed[:, token]
                same(firsts[row], sinks)


def test_tokens_beyond_the_cache_are_not_written():
    member = random_membership(4, 2, 1).to(DEVICE)
    new = torch.randn(1, 4, 6, 16, device=DEVICE)
    room = torch.full((1, 4, 20, 16), torch.nan, device=DEVICE)
    key, value = room[:, :2, :10], torch.full((1, 4, 10, 16), torch.nan, device=DEVICE)
    write.write_dense(new, new, key, value, member, torch.tensor([7], device=DEVICE))
    assert torch.equal(value[0, :, 7:], new[0, member.value_heads[0], :3])
    assert room[:, :, 10:].isnan().all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "clusters"), SHAPES)
def test_pages(heads, kv_heads, clusters, shared):
    tokens, dim, page, pages = 11, 48, 8, 5
    member = random_membership(heads, clusters, 1 if shared else 3, kv_heads)
    key, value = torch.randn(tokens, kv_heads, dim), torch.randn(tokens, kv_heads, 40)
    slots = torch.randperm(page * pages)[:tokens]
    slots[4] = -1
    ids = None if shared else torch.randint(0, 3, (tokens,), dtype=torch.int32)
    results = []
    for function, device in ((launch_paged, DEVICE), (write_paged, "cpu")):
        keys = torch.full((pages, page, member.kept_keys, dim), torch.nan, device=device)
        values = torch.full((pages, page, kv_heads, 40), torch.nan, device=device)
        function(
            key.to(device), value.to(device), keys, values, slots.to(device), member.to(device),
            None if ids is None else ids.to(device),
        )  # fmt: skip
        results.append((keys, values))
    for got, want in zip(*results, strict=True):
        same(got, want)
    keys, values = results[1]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            own = 0 if ids is None else int(ids[token])
            at = slot // page, slot % page
            assert torch.equal(keys[at], key[token, member.key_heads[own]])
            assert torch.equal(values[at], value[token, member.value_heads[own]])
            keys[at], values[at] = torch.nan, torch.nan
    assert keys.isnan().all()
    assert values.isnan().all()


def test_what_does_not_fit_is_refused():
    member = random_membership(4, 2, 1)
    new = torch.randn(1, 4, 3, 16)
    key, value = (torch.zeros(1, n, 9, 16) for n in (2, 4))
    start = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit caches"):
        cache_write.write_dense(new, new, value, value, member, start)
    with pytest.raises(ValueError, match="do not fit caches"):
        cache_write.write_dense(new[:, :2], new, key, value, member, start)
    with pytest.raises(ValueError, match="cannot take"):
        cache_write.write_dense(new.half(), new.half(), key, value, member, start)
    with pytest.raises(ValueError, match="consecutive"):
        cache_write.write_dense(new, new.mT.contiguous().mT, key, value, member, start)


@pytest.mark.parametrize("streaming", [0, 3])
def test_a_writer_takes_steps_of_any_size_and_layout(streaming):
    heads, dim, page, pages = 9, 16, 8, 20
    member = random_membership(heads, 3, 1, streaming=streaming)
    counts = [(member.kept_keys, member.kept_values)]
    counts.append((heads - counts[0][0], heads - counts[0][1]))
    caches = []
    for make, device in ((write.PagedWrite, DEVICE), (cache_write.PageWriter, "cpu")):
        far, near = (
            [torch.full((pages, page, n, dim), torch.nan, device=device) for n in each]
            for each in counts
        )
        local = LocalPages(*near, torch.zeros(1, 1, dtype=torch.int32), 4, 1)
        made = make(*far, member.to(device), local)
        caches.append((getattr(made, "write", made), device, (*far, *near)))
    for tokens, fused in ((1, True), (30, True), (0, False), (30, False), (33, True), (1, False)):
        states = torch.randn(tokens, 3 * heads, dim)
        slots, local_slots = (torch.randperm(page * pages)[:tokens] for _ in range(2))
        for function, device, _ in caches:
            _, key, value = states.to(device).split(heads, 1)
            if not fused:
                key, value = key.contiguous(), value.contiguous()
            function(
                key, value, slots.to(device), None, local_slots.to(device), (1.0, 1.0), None
            )  # fmt: skip
        for got, want in zip(caches[0][2], caches[1][2], strict=True):
            same(got, want)


def test_a_writer_that_has_written_refuses_what_does_not_fit():
    member = random_membership(4, 2)
    writer = cache_write.PageWriter(torch.zeros(2, 8, 2, 16), torch.zeros(2, 8, 4, 16), member)
    key, slots = torch.randn(3, 4, 16), torch.arange(3)
    writer.write(key, key, slots)
    for wrong in (
        (key[:, :3], key, slots), (key, key[..., :8], slots), (key, key, slots[:2]),
        (key, key, slots, slots[:1].int()), (key.half(), key.half(), slots),
        (key.mT.contiguous().mT, key, slots),
    ):  # fmt: skip
        with pytest.raises(AttentionInputError):
            writer.write(*wrong)
