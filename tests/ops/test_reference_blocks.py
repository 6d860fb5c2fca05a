"""Blocks of queries in the reference, for devices without a kernel: the same, and bounded."""

import pytest
import torch

from chai_attention.ops import dispatch, reference, reference_backend
from chai_attention.ops.dispatch import REFERENCE
from chai_attention.ops.reference_backend import ReferenceBackend
from helpers import clustered_inputs, random_membership
from largest_tensor import largest_tensor
from op_calls import Operations


def inputs(queries, size, spare=0):
    member = random_membership(6, 3, 2, 6)
    query, key, value = (torch.randn(2, 6, n, 16) for n in (queries, size, size))
    q, k, v = clustered_inputs(member, query, key, value)
    if spare:
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, spare)) for x in (k, v))
    return q, k, v, member


@pytest.mark.parametrize("scores", [1, 1000, 5000])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize(("queries", "size"), [(1, 1), (7, 63), (63, 63), (129, 130)])
def test_blocks_are_the_definition(queries, size, spare, pad, scores, monkeypatch):
    q, k, v, member = inputs(queries, size, spare)
    valid = lengths = None
    if pad:
        valid = torch.rand(2, size + spare) < 0.7
    if spare:
        lengths = torch.tensor([size, max(queries, size - 3)])
    options = {"scale": 0.2, "lengths": lengths, "valid": valid, "softcap": 4.0}
    want = reference.clustered_attention(q, k, v, member, return_lse=True, **options)
    monkeypatch.setattr(reference_backend, "SCORES", scores)
    got = Operations(REFERENCE).attention(q, k, v, member, return_lse=True, **options)
    torch.testing.assert_close(got, want)
    out, lse = Operations(REFERENCE).attention(q, k, v, member, **options)
    assert lse is None
    torch.testing.assert_close(out, want[0])


def test_scores_of_a_long_text_are_never_made_at_once(monkeypatch):
    monkeypatch.setattr(reference_backend, "SCORES", 60_000)
    monkeypatch.setattr(dispatch, "choose", lambda *a: ReferenceBackend("there is none"))
    q, k, v, member = inputs(400, 400)
    monkeypatch.setattr(reference_backend, "_warned", set())
    with largest_tensor() as made, pytest.warns(UserWarning, match="0.00023 GB"):
        dispatch.attention(q, k, v, member, scale=0.2)
    assert made.numbers <= max(60_000, 2 * 6 * 400 * 16)
