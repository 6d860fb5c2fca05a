"""Decode over pages: the kernel against the definition, on a GPU if there is one."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from helpers import random_membership
from op_calls import dispatched, kernels
from paged_caches import paged_caches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _nan_memory(nan_memory):
    """Fresh memory holds NaN."""


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("one_buffer", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "dim", "page"),
    [
        (9, 9, 4, 48, 16),
        (12, 12, 1, 64, 8),
        (32, 32, 5, 128, 16),
        (9, 3, 4, 80, 32),
        (8, 8, 8, 96, 24),
    ],
)
def test_pages_are_the_reference(heads, kv_heads, clusters, dim, page, one_buffer, dtype):
    lengths = [1, 63, 0, 129]
    member = random_membership(heads, clusters, 4, kv_heads)
    case = paged_caches(member, lengths, page, dim, 40, dtype, DEVICE, one_buffer)
    query = torch.randn(4, heads, dim, dtype=dtype, device=DEVICE)
    options = {"lengths": case.lengths, "scale": dim**-0.5, "return_lse": True}
    member = member.to(DEVICE)
    want, want_lse = dispatched.paged_decode(
        query.double().cpu(), case.keys.double().cpu(), case.values.double().cpu(),
        case.table.cpu(), member.to("cpu"), **{**options, "lengths": case.lengths.cpu()},
    )  # fmt: skip
    for part in (query, query.gather(1, member.slot_heads[:, :, None].expand(-1, -1, dim))):
        got, lse = kernels.paged_decode(part, case.keys, case.values, case.table, member, **options)
        assert_close(got.double().cpu(), want, atol=TOLERANCE[dtype], rtol=0)
        assert_close(lse.cpu(), want_lse, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_of_a_longer_lived_membership(shared):
    slots = random_membership(6, 2, 1 if shared else 5)
    rows = torch.tensor([0, 0, 0] if shared else [4, 1, 4], dtype=torch.int32)
    member = slots.select(rows.long())
    case = paged_caches(member, [40, 7, 90], 16, 32, 32, torch.float32, DEVICE)
    query = torch.randn(3, 6, 32, device=DEVICE)
    want, _ = dispatched.paged_decode(
        query.cpu(), case.keys.cpu(), case.values.cpu(), case.table.cpu(), member,
        lengths=case.lengths.cpu(), scale=0.2,
    )  # fmt: skip
    out = torch.full((3, 7, 32), torch.nan, device=DEVICE)[:, :6]
    got, _ = kernels.paged_decode(
        query, case.keys, case.values, case.table, slots.to(DEVICE), lengths=case.lengths,
        scale=0.2, rows=None if shared else rows.to(DEVICE), out=out, most_keys=90,
    )  # fmt: skip
    assert got is out
    assert_close(got.cpu(), want, atol=2e-5, rtol=0)


def test_softcap():
    member = random_membership(6, 2, 2)
    case = paged_caches(member, [40, 70], 16, 32, 32, torch.float32, DEVICE)
    query = torch.randn(2, 6, 32, device=DEVICE)
    options = {"scale": 0.5, "softcap": 3.0}
    want, _ = dispatched.paged_decode(
        query.cpu(), case.keys.cpu(), case.values.cpu(), case.table.cpu(), member,
        lengths=case.lengths.cpu(), **options,
    )  # fmt: skip
    got, _ = kernels.paged_decode(
        query, case.keys, case.values, case.table, member.to(DEVICE), lengths=case.lengths,
        **options,
    )  # fmt: skip
    assert_close(got.cpu(), want, atol=2e-5, rtol=0)
