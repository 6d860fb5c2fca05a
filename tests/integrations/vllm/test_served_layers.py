"""Profiles as ranks serve them: pages and heads of every layer; no vLLM needed."""

import pytest
import torch

from chai_attention.errors import ProfileError
from chai_attention.integrations.transformers.support import ModelShape
from chai_attention.integrations.vllm.layers import served_layers
from chai_attention.profile import ClusterProfile


def shape_of(heads: int, kv_heads: int, layers: int = 1) -> ModelShape:
    return ModelShape("llama", layers, heads, kv_heads, 64, (True,) * layers, 64 * heads)


def test_published_schedule_keeps_k_heads_of_k() -> None:
    layers = served_layers(shape_of(32, 32, 32), ClusterProfile.published("llama-7b"))
    assert [layer.kept for layer in layers] == [32] * 18 + [4] * 14
    numbers = [layer.layout(128, 128).numbers_per_token for layer in layers]
    assert numbers == [64 * 128] * 18 + [36 * 128] * 14


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_clusters_never_cross_ranks(ranks: int) -> None:
    rep = (0, 0, 2, 2, 0, 5, 5, 8, 8, 9, 10, 10)
    profile = ClusterProfile((len(set(rep)),), "static", representatives=(rep,))
    shares = [served_layers(shape_of(12, 12), profile, ranks, rank)[0] for rank in range(ranks)]
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
    shares = [served_layers(shape_of(16, 8), profile, 2, rank)[0] for rank in range(2)]
    assert shares[0].kept == shares[1].kept == 4
    for share in shares:
        assert share.membership().key_heads.shape == (1, share.kept)
        assert share.plan.kv_heads == 4


def test_k_bytes_profiles_keep_whole_groups() -> None:
    rep = (0, 1, 0, 1, 4, 5, 4, 5)  # 8 heads, 4 K/V heads, of which two keep their K
    profile = ClusterProfile((4,), "static", target="k-bytes", representatives=(rep,))
    whole = served_layers(shape_of(8, 4), profile)[0]
    assert whole.kept == 2
    shares = [served_layers(shape_of(8, 4), profile, 2, rank)[0] for rank in range(2)]
    assert [share.kept for share in shares] == [1, 1]
    assert [share.membership().representatives[0].tolist() for share in shares] == [
        [0, 1, 0, 1]
    ] * 2
    crossing = ClusterProfile(
        (4,), "static", target="k-bytes", representatives=((0, 1, 2, 3, 0, 1, 2, 3),)
    )
    shares = [served_layers(shape_of(8, 4), crossing, 2, rank)[0] for rank in range(2)]
    assert [share.kept for share in shares] == [2, 2]


def test_online_clusters_are_dealt_to_ranks() -> None:
    profile = ClusterProfile((5, 12), window=8)
    for ranks, kept in ((1, 5), (2, 3), (3, 2)):
        layers = served_layers(shape_of(12, 12, 2), profile, ranks)
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
    layer = served_layers(shape_of(6, 6), ClusterProfile((2,), window=8, **options))[0]
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
    plan = served_layers(shape_of(8, 8), profile, 2, 1)[0].plan
    wanted = torch.tensor(table)[4:, 4:]
    assert torch.equal(torch.tensor(plan.costs), wanted)
    assert torch.equal(torch.tensor(plan.offsets), wanted)


def test_ranks_that_do_not_fit() -> None:
    with pytest.raises(ProfileError, match="cannot be dealt to 4 ranks"):
        served_layers(shape_of(9, 3), ClusterProfile((9,)), 4)
