"""Profiles as ranks serve them: pages and heads of every layer; no vLLM needed."""

import math
import random

import pytest
import torch

from chai_attention.errors import ProfileError
from chai_attention.integrations.vllm.layers import (
    LayerShard,
    PageLayout,
    local_page,
    local_page_tokens,
)
from chai_attention.integrations.vllm.shares import layer_shards, savings
from chai_attention.profile import ClusterProfile
from chai_attention.runtime.shape import ModelShape


def shape_of(heads: int, kv_heads: int, layers: int = 1) -> ModelShape:
    return ModelShape("llama", layers, heads, kv_heads, 64, (True,) * layers, 64 * heads)


def test_published_schedule_keeps_k_heads_of_k() -> None:
    layers = layer_shards(shape_of(32, 32, 32), ClusterProfile.published("llama-7b"))
    assert [layer.kept for layer in layers] == [32] * 18 + [4] * 14
    numbers = [layer.layout(128, 128).numbers_per_token for layer in layers]
    assert numbers == [64 * 128] * 18 + [36 * 128] * 14


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_clusters_never_cross_ranks(ranks: int) -> None:
    rep = (0, 0, 2, 2, 0, 5, 5, 8, 8, 9, 10, 10)
    profile = ClusterProfile((len(set(rep)),), "static", representatives=(rep,))
    shares = [layer_shards(shape_of(12, 12), profile, ranks, rank)[0] for rank in range(ranks)]
    assert len({share.kept for share in shares}) == 1  # pages of one size
    for rank, share in enumerate(shares):
        first, heads = rank * 12 // ranks, 12 // ranks
        local = share.membership().representatives[0]
        assert local.shape == (heads,)
        assert bool((local[local] == local).all())
        for head, chosen in enumerate(local.tolist()):
            # a head uses its own scores or those of a head of its cluster
            assert chosen == head or rep[first + chosen] == rep[first + head]
        if ranks == 1:
            assert tuple(local.tolist()) == rep


def test_grouped_heads_keep_the_same_number_of_keys_on_every_rank() -> None:
    rep = (0, 0, 0, 0, 4, 5, 6, 7, 4, 5, 6, 7, 12, 13, 14, 15)  # 16 heads, 8 K/V heads
    profile = ClusterProfile((len(set(rep)),), "static", representatives=(rep,))
    shares = [layer_shards(shape_of(16, 8), profile, 2, rank)[0] for rank in range(2)]
    assert shares[0].kept == shares[1].kept == 4
    for share in shares:
        assert share.membership().key_heads.shape == (1, share.kept)
        assert share.plan.kv_heads == 4


def test_k_bytes_profiles_keep_whole_groups() -> None:
    rep = (0, 1, 0, 1, 4, 5, 4, 5)  # 8 heads, 4 K/V heads, of which two keep their K
    profile = ClusterProfile((4,), "static", target="k-bytes", representatives=(rep,))
    whole = layer_shards(shape_of(8, 4), profile)[0]
    assert whole.kept == 2
    shares = [layer_shards(shape_of(8, 4), profile, 2, rank)[0] for rank in range(2)]
    assert [share.kept for share in shares] == [1, 1]
    assert [share.membership().representatives[0].tolist() for share in shares] == [
        [0, 1, 0, 1]
    ] * 2
    crossing = ClusterProfile(
        (4,), "static", target="k-bytes", representatives=((0, 1, 2, 3, 0, 1, 2, 3),)
    )
    shares = [layer_shards(shape_of(8, 4), crossing, 2, rank)[0] for rank in range(2)]
    assert [share.kept for share in shares] == [2, 2]


def test_online_clusters_are_dealt_to_ranks() -> None:
    profile = ClusterProfile((5, 12), window=8)
    for ranks, kept in ((1, 5), (2, 3), (3, 2)):
        layers = layer_shards(shape_of(12, 12, 2), profile, ranks)
        assert [layer.kept for layer in layers] == [kept, 12 // ranks]
        assert layers[0].plan.needs_probe
        assert not layers[1].plan.needs_probe


@pytest.mark.parametrize("kind", ["costs", "similarity", "nothing"])
def test_fallback_of_short_requests_uses_what_is_known(kind: str) -> None:
    far = [[0.0 if a % 2 == b % 2 else 1.0 for b in range(6)] for a in range(6)]
    options = {}
    if kind == "costs":
        options = {"membership": "blend", "costs": [far]}
    elif kind == "similarity":
        options = {"similarity": [[[1 - x for x in row] for row in far]]}
    layer = layer_shards(shape_of(6, 6), ClusterProfile((2,), window=8, **options))[0]
    expected = [0, 1, 0, 1, 0, 1] if kind != "nothing" else None
    rep = layer.membership().representatives[0]
    assert len(set(rep.tolist())) == 2
    if expected is not None:
        assert rep.tolist() == expected
    elif kind == "nothing":  # neighbours
        assert rep.tolist() == sorted(rep.tolist())


def test_costs_and_offsets_are_cut_to_the_rank() -> None:
    table = [[float(10 * a + b) if a != b else 0.0 for b in range(8)] for a in range(8)]
    profile = ClusterProfile(
        (4,), "blend", window=8, costs=[table], recent=4, sinks=1, offsets=[table]
    )
    plan = layer_shards(shape_of(8, 8), profile, 2, 1)[0].plan
    wanted = torch.tensor(table)[4:, 4:]
    assert torch.equal(torch.tensor(plan.costs), wanted)
    assert torch.equal(torch.tensor(plan.offsets), wanted)


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(8, 2, 4), (8, 1, 2), (9, 3, 9)])
def test_ranks_hold_copies_of_kv_heads_where_there_are_fewer(heads, kv_heads, ranks) -> None:
    every = tuple(range(heads))
    profile = ClusterProfile(
        (0, heads, 1), "static", representatives=(every, every, (0,) * heads), recent=8, sinks=2,
        streaming=(every, (), ()), tensor_parallel=1,
    )  # fmt: skip
    shape = shape_of(heads, kv_heads, 3)
    for rank in range(ranks):
        local, own, shared = layer_shards(shape, profile, ranks, rank)
        assert [(x.plan.heads, x.plan.kv_heads) for x in (local, own, shared)] == [
            (heads // ranks, 1)
        ] * 3
        assert (local.kept, local.kept_values) == (0, 0)
        assert (own.kept, own.plan.is_identity) == (1, True)
        assert (shared.kept, shared.kept_values) == (1, 1)  # who follows one head follows its own
    assert savings(shape, profile, ranks).share == pytest.approx(1 / 3)
    online = ClusterProfile((kv_heads,), window=8)
    assert layer_shards(shape_of(heads, kv_heads), online, ranks)[0].kept == 1


def test_ranks_that_do_not_fit() -> None:
    with pytest.raises(ProfileError, match="cannot be dealt to 4 ranks"):
        layer_shards(shape_of(9, 3), ClusterProfile((9,)), 4)


# ---- streaming heads


def random_layer(seed: int, heads: int, kv_heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Representatives and streaming heads of a static layer."""
    chosen = random.Random(seed)
    streaming = {head for head in range(heads) if chosen.random() < chosen.choice([0, 0.3, 0.7])}
    if seed % 5 == 0:  # all of them on the first half
        streaming = set(range(heads // 2))
    far = [head for head in range(heads) if head not in streaming]
    reps = chosen.sample(far, chosen.randint(1, len(far))) if far else []
    rep = [
        head if head in streaming or head in reps else chosen.choice(reps) for head in range(heads)
    ]
    return tuple(rep), tuple(sorted(streaming))


def sees(layer: LayerShard) -> list[str]:
    """What each head does with far keys."""
    rep = layer.membership().representatives[0].tolist()
    return [
        "local" if head in layer.streaming else "own" if rep[head] == head else "other's"
        for head in range(len(rep))
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (32, 8), (16, 4)])
@pytest.mark.parametrize("seed", range(20))
def test_streaming_heads_are_dealt_to_ranks_with_pages_of_one_size(
    seed, heads, kv_heads, ranks
) -> None:
    rep, streaming = random_layer(seed, heads, kv_heads)
    k = len(set(rep)) - len(streaming)
    profile = ClusterProfile(
        (k,), "static", representatives=(rep,), streaming=(streaming,), recent=8, sinks=2
    )
    shape = shape_of(heads, kv_heads)
    whole = layer_shards(shape, profile)[0]
    shares = [layer_shards(shape, profile, ranks, rank)[0] for rank in range(ranks)]
    assert len({share.layout(64, 64) for share in shares}) == 1
    assert len({share.local_layout(64, 64) for share in shares}) == 1
    assert len({share.plan.is_identity for share in shares}) == 1
    before = sees(whole)
    for rank, share in enumerate(shares):
        first = rank * heads // ranks
        member = share.membership()
        assert member.streaming == share.streaming == share.plan.streaming
        assert (member.kept_keys, member.kept_values) == (share.kept, share.kept_values)
        assert member.key_heads.shape == (1, share.kept)
        assert member.value_heads.shape == (1, share.kept_values)
        for head, now in enumerate(sees(share)):
            was = before[first + head]
            # what was exact stays so; nobody shares or forgets who did not
            assert now in (was, "own")
            chosen = int(member.representatives[0, head])
            assert chosen == head or rep[first + chosen] == rep[first + head]
    if ranks == 1:
        assert whole.membership().representatives[0].tolist() == list(rep)
        assert whole.streaming == streaming
        assert whole.kept == profile.kept_keys(0, shape)
        assert whole.kept_values == profile.kept_values(0, shape)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (32, 8)])
@pytest.mark.parametrize("target", ["scores", "k-bytes"])
@pytest.mark.parametrize("streams", ["even", "first", "alternate", "most", "a rank"])
def test_streaming_heads_of_online_profiles_are_dealt_to_ranks(
    streams, target, heads, kv_heads, ranks
) -> None:
    group = heads // kv_heads
    if target == "k-bytes" and group == 1:
        pytest.skip("grouped queries only")
    groups = {
        "even": [g for g in range(kv_heads) if g % (kv_heads // ranks) == 0],
        "first": [0],
        "alternate": list(range(0, kv_heads, 2)),
        "most": list(range(kv_heads - 2)),
        "a rank": list(range(kv_heads // ranks)),
    }[streams]
    streaming = tuple(g * group + i for g in groups for i in range(group))
    far = heads - len(streaming)
    clusters = far // 2 // group * group or group
    profile = ClusterProfile(
        (clusters,), target=target, window=8, streaming=(streaming,), recent=8, sinks=2
    )
    shape = shape_of(heads, kv_heads)
    shares = [layer_shards(shape, profile, ranks, rank)[0] for rank in range(ranks)]
    assert len({share.layout(64, 64) for share in shares}) == 1
    assert len({share.local_layout(64, 64) for share in shares}) == 1
    assert len({share.plan.is_identity for share in shares}) == 1
    whole = layer_shards(shape, profile)[0]
    assert whole.streaming == streaming
    assert whole.plan.clusters == clusters
    torch.manual_seed(0)
    for rank, share in enumerate(shares):
        first, own = rank * heads // ranks, heads // ranks
        if share.plan.is_identity:
            continue
        states = (torch.randn(2, n, 8, 16) for n in (own, own // group, own // group))
        member = share.membership()
        if share.plan.needs_probe:
            found = share.plan.online_membership(*states, 1.0, None)
            member = share.membership_of(found.representatives)
        assert member.streaming == share.streaming
        assert set(share.streaming) <= {h - first for h in streaming}
        assert member.key_heads.shape[1] == share.kept
        assert member.value_heads.shape[1] == share.kept_values
        rep = member.representatives
        # a head that streams in the profile streams, or attends to everything by itself
        for head in (h - first for h in streaming if first <= h < first + own):
            assert bool((rep[:, head] == head).all())
            assert not bool((rep == head).sum(1).gt(1).any())
        ranks_far = own - len([h for h in streaming if first <= h < first + own])
        assert share.plan.clusters * far >= clusters * ranks_far


def test_heads_of_the_default_recipe_make_these_pages() -> None:
    # 8 keep, 12 share, 12 stream in every layer of 32
    rep = [head if head < 8 or head >= 20 else head % 8 for head in range(32)]
    profile = ClusterProfile(
        (8,) * 32, "static", representatives=[rep] * 32, streaming=[tuple(range(20, 32))] * 32,
        recent=128, sinks=4,
    )  # fmt: skip
    layers = layer_shards(shape_of(32, 32, 32), profile)
    far, local = layers[0].layout(128, 128), layers[0].local_layout(128, 128)
    assert local is not None
    assert (far.key_heads, far.value_heads) == (8, 20)
    assert (local.key_heads, local.value_heads) == (24, 12)
    assert local_page_tokens(layers, 64, 128, 128) == 48


def test_a_layer_whose_heads_all_stream_has_pages_of_next_to_nothing() -> None:
    every = tuple(range(8))
    profile = ClusterProfile(
        (0, 8), "static", representatives=[every] * 2, streaming=[every, ()], recent=8, sinks=2
    )
    for ranks in (1, 2):
        layer, plain = layer_shards(shape_of(8, 8, 2), profile, ranks)
        assert plain.plan.is_identity
        assert plain.local_layout(64, 64) is None
        assert (layer.kept, layer.kept_values) == (0, 0)
        layout = layer.layout(64, 64)
        assert layout.page_bytes(16, 2) == 32
        key, value = layout.split(torch.zeros(3, 1, 16, layout.numbers_per_token))
        assert key.shape == value.shape == (3, 16, 0, 64)
        assert layer.local_layout(64, 64) == PageLayout(8 // ranks, 8 // ranks, 64, 64)


@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("local", [1, 4, 20, 24, 36, 60])
@pytest.mark.parametrize("recent", [9, 128, 512])
def test_local_pages_fill_a_block_and_prefixes_are_found_again(page, local, recent) -> None:
    far = 64 - local
    tokens = local_page(page, far, local, recent)
    assert tokens % 16 == 0
    assert math.lcm(tokens, page) <= 4 * page
    if tokens > 16:
        assert tokens * local <= page * far
    longest = min(4 * page, max(2 * page, recent))
    larger = [n for n in range(tokens + 16, longest + 1, 16) if math.lcm(n, page) <= 4 * page]
    assert all(n * local > page * far for n in larger)
