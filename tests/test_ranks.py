"""How heads are dealt to ranks, and what would leave some of them a head to spare."""

import pytest

from chai_attention.ranks import copies, distinct_ranks, rank_problem, spare


@pytest.mark.parametrize(
    ("heads", "kv_heads", "able"),
    [(8, 8, [1, 2, 4, 8]), (9, 3, [1, 3, 9]), (12, 4, [1, 2, 4, 12]), (6, 1, [1, 2, 3, 6])],
)
def test_heads_can_be_dealt_as_vllm_does(heads, kv_heads, able):
    found = [n for n in range(1, heads + 2) if rank_problem(heads, kv_heads, n) is None]
    assert found == able
    for ranks in able:
        assert distinct_ranks(kv_heads, ranks) * copies(kv_heads, ranks) == ranks
    assert f"choose {', '.join(map(str, able))}" in rank_problem(heads, kv_heads, heads + 1)


def test_what_is_dealt_evenly_leaves_nothing_to_spare():
    rep, streaming = (0, 0, 2, 3, 5, 5, 6, 7), (3, 6)
    for ranks in (1, 2):
        assert not list(spare(rep, streaming, 8, ranks))
    assert list(spare(rep, streaming, 8, 4)) == ["ranks keep 2, 1, 2, 1 V heads"]
    assert list(spare(rep, (3,), 8, 2)) == ["ranks keep 2, 3 K heads", "ranks keep 3, 4 V heads"]
    assert list(spare(rep, (6,), 8, 8)) == ["head 1 uses the scores of head 0 on another rank"]


def test_ranks_that_hold_the_same_kv_head_each_need_it_or_not():
    every = tuple(range(8))
    assert not list(spare(every, every, 2, 4))
    assert list(spare(every, (0, 1), 2, 4)) == [
        "ranks keep 0, 1, 1, 1 K heads",
        "ranks keep 0, 1, 1, 1 V heads",
    ]
