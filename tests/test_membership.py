import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chai_attention.membership import Membership
from helpers import random_membership


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_agree_with_the_vector(data):
    group = data.draw(st.sampled_from([1, 2, 3]))
    kv_heads = data.draw(st.integers(1, 8))
    heads = group * kv_heads
    clusters = data.draw(st.integers(1, heads))
    batch = data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    member = random_membership(heads, clusters, batch, kv_heads)
    rep = member.representatives
    for b in range(batch):
        slots = member.slot_heads[b].tolist()
        assert slots == sorted(set(rep[b].tolist()))
        for h in range(heads):
            assert slots[member.slot[b, h]] == rep[b, h]
            assert member.value_heads[b, member.value_slot[b, h]] == h // group
        for slot, head in enumerate(slots):
            assert member.key_heads[b, member.key_slot[b, slot]] == head // group
        kept = member.key_heads[b].tolist()
        assert len(set(kept)) == member.kept_keys == len(kept)
        stored = kept + member.removed_key_heads[b].tolist()
        assert [stored[place] for place in member.key_place[b]] == list(range(kv_heads))
        cluster_of = [int(member.slot[b, h]) for h in member.order[b]]
        assert cluster_of == sorted(cluster_of)
        bounds = member.offsets[b].tolist()
        for c in range(clusters):
            assert cluster_of[bounds[c] : bounds[c + 1]] == [c] * (bounds[c + 1] - bounds[c])


def test_identity_keeps_every_head():
    member = Membership.identity(6, 3, batch=2)
    assert member.is_identity
    assert member.kept_keys == 3
    assert member.key_heads.tolist() == [[0, 1, 2]] * 2
    assert member.key_slot.tolist() == [[0, 0, 1, 1, 2, 2]] * 2


@pytest.mark.parametrize(
    ("rep", "message"),
    [
        ([0, 4, 0], "not a head"),
        ([1, 2, 2], "its own representative"),
        ([[0, 0], [0, 1]], "same number of clusters"),
        (torch.zeros(0, 3, dtype=torch.long), "at least one"),
    ],
)
def test_bad_vectors_are_refused(rep, message):
    with pytest.raises(ValueError, match=message):
        Membership.from_representatives(torch.as_tensor(rep))


def test_heads_must_split_over_kv_heads():
    with pytest.raises(ValueError, match="cannot be split"):
        Membership.from_representatives(torch.arange(9), kv_heads=2)


def test_select_takes_rows():
    member = random_membership(8, 3, batch=3)
    picked = member.select(torch.tensor([2, 0, 2]))
    assert torch.equal(picked.representatives, member.representatives[[2, 0, 2]])
    assert torch.equal(picked.slot, member.slot[[2, 0, 2]])
