"""The list of work of Hopper's packed prefill kernels, on a GPU if there is one."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.ops.call import PackedQueries
from chai_attention.ops.triton.head_tiles import head_tiles_of
from chai_attention.ops.triton.hopper_work import COPIES, plan, plan_of
from helpers import random_membership

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("queries", [[300], [0, 128, 1, 129, 0], [5] * 40, [3, 200, 0] * 50])
@pytest.mark.parametrize("shared", [False, True])
def test_list_of_work(queries, shared):
    """Items of every sequence, without those that have no heads to attend for."""
    batch = len(queries)
    tables = random_membership(9, 3, 1 if shared else 4)
    ids = None if shared else torch.randint(0, 4, (batch,), dtype=torch.int32)
    head_tiles = head_tiles_of(tables.to(DEVICE), 2)
    starts = torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE)
    got = plan(head_tiles, starts, None if ids is None else ids.to(DEVICE), 128)[0]
    used = (head_tiles.slot >= 0).sum(1).cpu()
    own = torch.zeros(batch, dtype=torch.long) if ids is None else ids.long()
    items = -(-torch.tensor(queries) // 128) * used[own]
    assert got.tolist() == [0, *items.cumsum(0).tolist(), 0]
    # a row's head tiles with work are its first
    assert (head_tiles.slot >= 0).int().diff(dim=1).max() <= 0


@pytest.mark.parametrize("streaming", [0, 3])
def test_layers_of_a_step_share_the_list_where_it_is_the_same(streaming):
    starts = torch.tensor([0, 300, 301, 301, 600], dtype=torch.int32, device=DEVICE)
    queries = PackedQueries(torch.empty(600, 9, 16, device=DEVICE), starts, 300, {})
    given, wanted = [], []
    for layer in range(COPIES + 3):
        rows = 4 if layer % 7 == 5 else 1  # layers whose requests have memberships of their own
        tables = random_membership(9, 3, rows, streaming=streaming)  # of any number of head tiles
        head_tiles = head_tiles_of(tables.to(DEVICE), 2)
        ids = torch.arange(4, dtype=torch.int32, device=DEVICE) if rows > 1 else None
        given.append(plan_of(head_tiles, queries, ids, 128))
        wanted.append(plan(head_tiles, starts, ids, 128)[0])
    for got, alone in zip(given, wanted, strict=True):
        assert torch.equal(got, alone)
        assert got.data_ptr() % 16 == 0
    assert len({got.data_ptr() for got in given}) == len(given)  # each has a counter of its own
    assert len(queries.shared) > 1
