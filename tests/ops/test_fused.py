"""Fused attention of clusters against the reference, and which of them it takes."""

import pytest
import torch

from chai_attention.membership import Membership
from chai_attention.ops import DenseKV, blocked, fused, reference
from helpers import clustered_inputs, random_membership
from op_calls import attend_by


def whole_groups(heads, kv_heads, kept, batch):
    """Memberships as target "k-bytes" makes them: a K/V head follows another with all its heads."""
    groups = random_membership(kv_heads, kept, batch).representatives
    each = heads // kv_heads
    rep = groups.repeat_interleave(each, 1) * each + torch.arange(heads) % each
    return Membership.from_representatives(rep, kv_heads=kv_heads)


MEMBERSHIPS = {
    "uneven": lambda: random_membership(9, 4, 2),
    "even": lambda: Membership.from_representatives(torch.tensor([[0, 0, 2, 2, 4, 4]] * 2)),
    "one": lambda: random_membership(7, 1, 2),
    "all": lambda: Membership.identity(6, batch=2),
    "singles and a large one": lambda: Membership.from_representatives(
        torch.tensor([[0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 10, 11]] * 2)
    ),
    "grouped": lambda: whole_groups(12, 4, 2, 2),
    "grouped, one": lambda: whole_groups(10, 5, 1, 2),
    "grouped, all": lambda: Membership.identity(8, 2, batch=2),
}


@pytest.fixture
def attended(monkeypatch):
    """The sequences that torch's kernel attended, by their runs of clusters."""
    seen = []
    attend = fused.attend

    def spy(row, runs, out, lse):
        seen.append([len(run.heads) for run in runs])
        attend(row, runs, out, lse)

    monkeypatch.setattr(fused, "attend", spy)
    return seen


@pytest.mark.parametrize("name", MEMBERSHIPS)
@pytest.mark.parametrize(
    ("queries", "size"), [(1, 1), (1, 300), (5, 5), (5, 70), (40, 40), (33, 150), (150, 150)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_reference(attended, name, queries, size, padded):
    torch.manual_seed(0)
    member = MEMBERSHIPS[name]()
    heads, groups = member.heads, member.kv_heads
    query = torch.randn(2, heads, queries, 48).bfloat16()
    key, value = (torch.randn(2, groups, size, 48).bfloat16() for _ in "kv")
    valid = torch.arange(size) >= torch.tensor([[0], [(size + 1) // 2]]) if padded else None
    inputs = clustered_inputs(member, query, key, value)
    options = {"scale": 0.2, "valid": valid, "return_lse": True}
    got, lse = attend_by(fused.torch_clustered_attention, *inputs, member, **options)
    want, want_lse = reference.clustered_attention(*(x.double() for x in inputs), member, **options)
    low, _ = reference.clustered_attention(*inputs, member, **options)
    loss = (low.double() - want).abs().max().item()
    assert len(attended) == 2
    if queries <= blocked.DECODE_ROWS:
        assert [sum(part) for part in attended] == [heads, heads]
    torch.testing.assert_close(
        got.double(), want, atol=2 * loss + 4 * torch.finfo(torch.bfloat16).eps, rtol=0
    )
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-4, rtol=1e-4)


def test_equal_clusters_are_one_call():
    (run,) = fused.runs_of(MEMBERSHIPS["even"]())
    assert (run.keys, run.values, run.count, run.each, run.group) == (range(3), range(6), 3, 2, 1)
    assert run.slots == (0, 0, 1, 1, 2, 2)
    singles, large, others = fused.runs_of(MEMBERSHIPS["singles and a large one"]())
    assert (singles.keys, large.keys, others.keys) == (range(3), range(3, 4), range(4, 6))
    assert (large.each, others.values) == (7, range(10, 12))


def test_in_prefill_large_clusters_share_their_scores():
    runs = fused.runs_of(MEMBERSHIPS["singles and a large one"]())
    assert [run.each for run in fused.worthwhile(runs, 9, 1000)] == [1, 1]
    assert len(fused.worthwhile(runs, 9, 100)) == 3
    assert len(fused.worthwhile(runs, 8, 1000)) == 3


def test_heads_of_a_group_that_follow_different_keys_are_not_for_it():
    member = Membership.from_representatives(torch.tensor([[0, 2, 2, 3]]), kv_heads=2)
    assert fused.runs_of(member) == ()


def test_only_what_torchs_kernel_takes():
    def takes(query, key, value, softcap=None):
        return fused.can_run(query, DenseKV(key, value), softcap)

    q, k, v = (torch.randn(1, 2, tokens, 8).bfloat16() for tokens in (1, 3, 3))
    assert takes(q, k, v)
    assert not takes(q, k, v, 5.0)
    assert takes(q.float(), k.float(), v.float())
    assert not takes(q, k, v[..., :4])
    # its kernel would read other numbers, or crash
    strided = v.mT.contiguous().mT
    assert not takes(q, k, strided)
    assert not takes(q, strided, v)
    assert not takes(q[:, :, :0], k, v)


def test_what_torchs_kernel_does_not_take_is_done_all_the_same():
    member = MEMBERSHIPS["uneven"]()
    query, key, value = (torch.randn(2, 9, tokens, 16) for tokens in (20, 40, 40))
    inputs = clustered_inputs(member, query, key, value)
    got, _ = attend_by(fused.torch_clustered_attention, *inputs, member, scale=0.3, softcap=4.0)
    want, _ = reference.clustered_attention(*inputs, member, scale=0.3, softcap=4.0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
