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
    streaming = data.draw(st.integers(0, heads))
    clusters = data.draw(st.integers(1, heads - streaming)) if streaming < heads else 0
    batch = data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    member = random_membership(heads, clusters, batch, kv_heads, streaming)
    rep = member.representatives
    for b in range(batch):
        slots = member.slot_heads[b].tolist()
        sees = [h for h in range(heads) if h not in member.streaming]
        assert slots == sorted({int(rep[b, h]) for h in sees})
        values = member.value_heads[b].tolist() + member.removed_value_heads[b].tolist()
        assert set(member.value_heads[b].tolist()) == {h // group for h in sees}
        assert member.kept_values == len({h // group for h in sees})
        assert sorted(values) == list(range(kv_heads))
        for h in range(heads):
            assert h in member.streaming or slots[member.slot[b, h]] == rep[b, h]
            assert values[member.value_slot[b, h]] == h // group
        for slot, head in enumerate(slots):
            assert member.key_heads[b, member.key_slot[b, slot]] == head // group
        kept = member.key_heads[b].tolist()
        assert len(set(kept)) == member.kept_keys == len(kept)
        stored = kept + member.removed_key_heads[b].tolist()
        assert [stored[place] for place in member.key_place[b]] == list(range(kv_heads))
        far = member.far
        if far is None:
            assert not sees
            continue
        assert far.heads == len(member.far_heads)
        for place, h in enumerate(member.far_heads):
            assert member.far_place[h] == place
            leader = member.far_heads[far.representatives[b, place]]
            assert leader == rep[b, h] if h in sees else leader in slots
            stored = member.value_heads[b, far.value_slot[b, place]]
            assert stored == h // group
        cluster_of = [int(far.slot[b, h]) for h in far.order[b]]
        assert cluster_of == sorted(cluster_of)
        bounds = far.offsets[b].tolist()
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


@pytest.mark.parametrize(("kept", "streaming"), [(3, (2, 3)), (4, ()), (1, range(6))])
def test_no_more_k_heads_are_kept_than_the_tables_name(kept, streaming):
    """Kernels would read tables of heads behind their end."""
    with pytest.raises(ValueError, match=f"{kept} kept K heads, but only"):
        Membership.from_representatives(torch.arange(6), None, 3, kept, streaming)
    one = Membership.from_representatives(torch.arange(6), None, 3, 3, (1, 3, 5))
    assert one.key_heads.tolist() == [[0, 1, 2]]


def test_select_takes_rows():
    member = random_membership(8, 3, batch=3)
    picked = member.select(torch.tensor([2, 0, 2]))
    assert torch.equal(picked.representatives, member.representatives[[2, 0, 2]])
    assert torch.equal(picked.slot, member.slot[[2, 0, 2]])


@pytest.mark.parametrize(
    ("rep", "streaming", "message"),
    [
        ([0, 0, 2], [0], "represents itself alone"),
        ([0, 0, 2], [1], "represents itself alone"),
        ([0, 1, 2], [3], "not a head"),
        ([0, 1, 2], [-1], "not a head"),
    ],
)
def test_a_streaming_head_represents_nobody(rep, streaming, message):
    with pytest.raises(ValueError, match=message):
        Membership.from_representatives(torch.tensor(rep), streaming=streaming)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.sampled_from([1, 2]))
def test_streaming_heads_beside_a_membership_of_the_others(seed, streaming, group):
    """As an online membership is made: from the heads that see far keys alone."""
    torch.manual_seed(seed)
    member = random_membership(8, 1, 2, 8 // group, streaming)
    if member.far is None:
        return
    again = Membership.with_streaming(member.far, 8, 8 // group, member.streaming)
    for name in ("representatives", "key_heads", "value_heads", "key_place", "value_slot"):
        assert torch.equal(getattr(again, name), getattr(member, name))
    assert again.kept_keys == member.kept_keys
    assert again.kept_values == member.kept_values
    assert again.select(torch.tensor([1])).streaming == member.streaming


def test_moving_to_where_it_is_keeps_what_was_made_of_it():
    member = random_membership(6, 2)
    assert member.to("cpu") is member
    assert member.derive(lambda made, size: [made, size], 3)[0] is member
    assert len(member.derived) == 1
