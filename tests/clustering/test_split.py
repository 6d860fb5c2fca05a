"""The best splits of heads against trying everything that heads can do."""

import itertools

import numpy as np
import pytest
import torch

from chai_attention.clustering import split
from chai_attention.clustering.exact import best_assignment
from chai_attention.clustering.split import best_splits

KEEP, STREAM = -1, -2


def tried(sharing, streaming, kv_heads):
    """Cheapest cost of saving at least 0, 1, 2, ... units, over all that all heads can do.

    K of a K/V head is needed if one of its heads keeps its own scores, V if one does not stream.
    """
    heads = len(sharing if streaming is None else streaming)
    group = heads // kv_heads
    choices = []
    for head in range(heads):
        able = [KEEP]
        if sharing is not None:
            able += [r for r in range(heads) if r != head]
        if streaming is not None:
            able.append(STREAM)
        choices.append(able)
    best = np.full(2 * kv_heads + 1, np.inf)
    for does in itertools.product(*choices):
        if any(r >= 0 and does[r] != KEEP for r in does):
            continue
        cost = sum(
            0.0 if r == KEEP else streaming[h].item() if r == STREAM else sharing[h, r].item()
            for h, r in enumerate(does)
        )
        parts = [does[g * group : (g + 1) * group] for g in range(kv_heads)]
        saved = sum(KEEP not in part for part in parts)
        saved += sum(all(r == STREAM for r in part) for part in parts)
        best[saved] = min(best[saved], cost)
    return np.minimum.accumulate(best[::-1])[::-1]


def tried_on_ranks(sharing, streaming, kv_heads, ranks):
    """`tried` where ranks have heads of their own, and keep as many K and V heads as each other."""
    heads = len(sharing if streaming is None else streaming)
    own, group, local = heads // ranks, heads // kv_heads, kv_heads // ranks
    tables = []
    for rank in range(ranks):
        mine = range(rank * own, (rank + 1) * own)
        choices = [
            [KEEP]
            + ([r for r in mine if r != head] if sharing is not None else [])
            + ([STREAM] if streaming is not None else [])
            for head in mine
        ]
        table = {}
        for does in itertools.product(*choices):
            does = dict(zip(mine, does, strict=True))
            if any(r >= 0 and does[r] != KEEP for r in does.values()):
                continue
            cost = sum(
                0.0 if r == KEEP else streaming[h].item() if r == STREAM else sharing[h, r].item()
                for h, r in does.items()
            )
            parts = [list(does.values())[g * group : (g + 1) * group] for g in range(local)]
            held = sum(KEEP in part for part in parts), sum(set(part) != {STREAM} for part in parts)
            table[held] = min(cost, table.get(held, np.inf))
        tables.append(table)
    best = np.full(2 * local + 1, np.inf)
    for keys, values in set.intersection(*map(set, tables)):
        saved = 2 * local - keys - values
        best[saved] = min(best[saved], sum(table[keys, values] for table in tables))
    return np.minimum.accumulate(best[::-1])[::-1]


def random_costs(heads, seed, kind="plain"):
    generator = torch.Generator().manual_seed(seed)
    sharing = torch.rand(heads, heads, generator=generator, dtype=torch.float64)
    streaming = torch.rand(heads, generator=generator, dtype=torch.float64)
    if kind == "far apart":  # as real costs are, over many orders of magnitude
        size = torch.randn(heads, generator=generator, dtype=torch.float64).mul(4).exp()
        sharing, streaming = sharing * size[:, None], streaming * size
    elif kind == "streaming is dear":
        streaming = streaming * 3
    sharing.fill_diagonal_(0)
    return sharing, streaming


def check(found, sharing, streaming, kv_heads):
    """Whether splits are what they say: valid, with the cost and saving stated."""
    for units, entry in enumerate(found):
        heads = len(entry.representatives)
        group = heads // kv_heads
        rep = torch.tensor(entry.representatives)
        assert (rep[rep] == rep).all()
        assert all(rep[h] == h for h in entry.streaming)
        assert not any(rep[h] in entry.streaming for h in range(heads) if h not in entry.streaming)
        own = [h for h in range(heads) if rep[h] == h and h not in entry.streaming]
        keeps = {h // group for h in own}
        assert all(len([h for h in own if h // group == g]) == group for g in keeps)
        whole = [
            g
            for g in range(kv_heads)
            if all(h in entry.streaming for h in range(g * group, (g + 1) * group))
        ]
        assert entry.saved == kv_heads - len(keeps) + len(whole) >= units
        cost = sum(streaming[h].item() for h in entry.streaming) if entry.streaming else 0.0
        if sharing is not None:
            cost += sum(sharing[h, r].item() for h, r in enumerate(rep.tolist()) if h != r)
        assert entry.cost == pytest.approx(cost)
    costs = [entry.cost for entry in found]
    assert costs == sorted(costs)


@pytest.mark.parametrize("how", ["all choices", "programs"])
@pytest.mark.parametrize("recipe", ["share", "stream", "both"])
@pytest.mark.parametrize("kind", ["plain", "far apart", "streaming is dear"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (5, 5), (6, 3), (6, 2), (4, 1), (1, 1)])
def test_nothing_is_cheaper(heads, kv_heads, kind, recipe, how, monkeypatch):
    if how == "programs":
        monkeypatch.setattr(split, "MAX_TRIED", 0)
    sharing, streaming = random_costs(heads, heads + kv_heads, kind)
    share = sharing if recipe != "stream" else None
    stream = streaming if recipe != "share" else None
    found = best_splits(share, stream, kv_heads)
    want = tried(share, stream, kv_heads)
    assert len(found) == np.isfinite(want).sum()
    assert [entry.cost for entry in found] == pytest.approx(want[: len(found)], rel=1e-6)
    check(found, share, stream, kv_heads)


@pytest.mark.parametrize("how", ["all choices", "programs"])
@pytest.mark.parametrize("recipe", ["share", "stream", "both"])
@pytest.mark.parametrize("kind", ["plain", "far apart", "streaming is dear"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks"), [(8, 8, 2), (8, 4, 2), (8, 8, 4), (12, 4, 4), (6, 6, 3)]
)
def test_nothing_is_cheaper_on_ranks(heads, kv_heads, ranks, kind, recipe, how, monkeypatch):
    if how == "programs":
        monkeypatch.setattr(split, "MAX_TRIED", 0)
    sharing, streaming = random_costs(heads, heads + kv_heads, kind)
    share = sharing if recipe != "stream" else None
    stream = streaming if recipe != "share" else None
    found = best_splits(share, stream, kv_heads, ranks=ranks)
    want = tried_on_ranks(share, stream, kv_heads, ranks)
    assert len(found) == np.isfinite(want).sum()
    assert [entry.cost for entry in found] == pytest.approx(want[: len(found)], rel=1e-6)
    own, group = heads // ranks, heads // kv_heads
    for entry in found:
        held = []
        for rank in range(ranks):
            mine = range(rank * own, (rank + 1) * own)
            assert all(entry.representatives[h] in mine for h in mine)
            far = [h for h in mine if h not in entry.streaming]
            held.append(
                (
                    len({entry.representatives[h] // group for h in far}),
                    len({h // group for h in far}),
                )
            )
        assert len(set(held)) == 1  # nobody keeps a head to spare
        assert entry.saved == 2 * kv_heads // ranks - sum(held[0])


def test_a_head_shares_though_streaming_is_cheaper_where_all_ranks_keep_its_v():
    """One unit each: sharing is cheap on the first rank, streaming would be on the second."""
    sharing = torch.full((4, 4), 9.0)
    sharing[1, 0], sharing[3, 2] = 0.1, 0.5
    streaming = torch.tensor([8.0, 5.0, 8.0, 0.2])
    one, two = best_splits(sharing, streaming, 4, ranks=2)[1:3]
    assert (one.representatives, one.streaming) == ((0, 0, 2, 2), ())
    assert (one.saved, one.cost) == (1, pytest.approx(0.6))
    assert (two.representatives, two.streaming) == ((0, 1, 2, 3), (1, 3))
    assert (two.saved, two.cost) == (2, pytest.approx(5.2))


@pytest.mark.parametrize("kind", ["plain", "far apart", "streaming is dear"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (24, 12)])
def test_programs_find_what_trying_all_choices_finds(heads, kv_heads, kind, monkeypatch):
    sharing, streaming = random_costs(heads, 5, kind)
    want = best_splits(sharing, streaming, kv_heads)
    monkeypatch.setattr(split, "MAX_TRIED", 0)
    found = best_splits(sharing, streaming, kv_heads)
    assert [e.cost for e in found] == pytest.approx([e.cost for e in want], rel=1e-5)
    check(found, sharing, streaming, kv_heads)


def test_many_heads():
    """32 heads: no head may better give up its K, keep it, or swap that with another."""
    sharing, streaming = random_costs(32, 1, "far apart")
    found = best_splits(sharing, streaming, 32)
    assert len(found) == 65
    check(found, sharing, streaming, 32)
    layer = split._Heads(sharing.numpy(), streaming.numpy(), 32)
    for units in (6, 20, 33, 50):
        does = found[units]
        kept = np.array(
            [h == r and h not in does.streaming for h, r in enumerate(does.representatives)]
        )
        one, two = np.eye(32, dtype=bool)[:, None], np.eye(32, dtype=bool)[None]
        others = (kept ^ one ^ two).reshape(-1, 32)
        tries = np.concatenate([others, kept ^ one[:, 0]])
        costs, _ = layer.curves(tries)  # by the V heads given up
        saved = (~tries).sum(1)[:, None] + np.arange(33)
        assert costs[saved >= units].min() >= does.cost * (1 - 1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "target"), [(9, 9, "scores"), (12, 4, "k-bytes")])
def test_sharing_alone_is_k_medoids(heads, kv_heads, target):
    sharing, _ = random_costs(heads, 3)
    found = best_splits(sharing, None, kv_heads)
    assert len(found) == kv_heads
    for units, entry in enumerate(found):
        clusters = (kv_heads - units) * heads // kv_heads
        rep = best_assignment(sharing, clusters, kv_heads, target)
        assert entry.cost == pytest.approx(sharing.gather(1, rep[:, None]).sum().item())
        assert entry.streaming == ()


def test_a_head_without_k_streams_where_that_is_cheaper_than_sharing():
    """K/V head 1 gives up K: of its two query heads one shares, the other streams; V is kept."""
    sharing = torch.full((4, 4), 9.0)
    sharing[2, 0] = 1.0
    streaming = torch.tensor([8.0, 8.0, 6.0, 0.5])
    one = best_splits(sharing, streaming, 2)[1]
    assert one.representatives == (0, 1, 0, 3)
    assert one.streaming == (3,)
    assert (one.saved, one.cost) == (1, 1.5)


def test_a_layer_may_stream_wholly():
    sharing, streaming = random_costs(5, 0)
    last = best_splits(sharing, streaming, 5)[-1]
    assert last.streaming == (0, 1, 2, 3, 4)
    assert last.saved == 10
    # with one head's K alone nobody can share its scores and save nine units
    assert best_splits(sharing, streaming, 5)[9] == last


def test_what_costs_nothing_is_saved_at_once():
    streaming = torch.tensor([0.0, 1.0, 0.0])
    found = best_splits(None, streaming, 3)
    assert [entry.saved for entry in found] == [4, 4, 4, 4, 4, 6, 6]
    assert found[0].streaming == (0, 2)


def test_no_head_may_do_anything():
    (only,) = best_splits(None, None, 2, 4)
    assert only == split.Split((0, 1, 2, 3), (), 0, 0.0)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_none_are_refused(wrong):
    sharing, streaming = random_costs(4, 0)
    streaming[2] = wrong
    with pytest.raises(ValueError, match="finite numbers of at least 0"):
        best_splits(sharing, streaming, 4)
    with pytest.raises(ValueError, match=r"\[4, 4\]"):
        best_splits(sharing[:, :3], None, 4)


def test_heads_that_do_not_split_over_kv_heads_are_refused():
    with pytest.raises(ValueError, match="4 heads cannot be split over 3"):
        best_splits(*random_costs(4, 0), 3)
    with pytest.raises(ValueError, match="4 K/V heads cannot be split over 3 ranks"):
        best_splits(*random_costs(4, 0), 4, ranks=3)
