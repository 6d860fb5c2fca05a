"""Write and decode over far and local pages by kernels, on a GPU if there is one."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from chai_attention.membership import Membership
from chai_attention.ops.fp8 import FLOAT8
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.membership_tables import update_tables
from chai_attention.ops.windowed import head_offsets
from helpers import random_membership, random_representatives
from local_pages_cases import case_definition, local_case
from op_calls import kernels
from page_writes import launch_paged, write_paged

pytestmark = pytest.mark.usefixtures("nan_memory")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies bfloat16 wrongly


def attend(case, query, member, tables=None, ids=None, offsets=None, **options):
    got, lse = kernels.paged_decode(
        query.to(DEVICE), *case.pages, case.table, (tables or member).to(DEVICE),
        lengths=case.lengths, local=case.local,
        ids=None if ids is None else ids.int().to(DEVICE),
        offset=None if (x := head_offsets(offsets, member)) is None else x.to(DEVICE), **options,
    )  # fmt: skip
    assert lse is None
    return got.double().cpu()


def written(member, lengths, dtype, **options):
    return local_case(
        member.to(DEVICE), lengths, launch_paged, dtype=dtype, device=DEVICE, **options
    )


def test_rows_of_a_longer_lived_membership():
    """Tokens come one by one; the last sequence is padding, as CUDA graphs have it."""
    tables, ids = random_membership(6, 2, 5, streaming=2), torch.tensor([4, 0, 4, 0])
    member = tables.select(ids)
    case = written(
        tables, [3, 20, 34, 0], torch.float32, page=16, local_page=16, recent=6, sinks=2, dim=32,
        value_dim=32, ids=ids, steps=True,
    )  # fmt: skip
    query = torch.randn(4, 6, 32)
    got = attend(case, query, member, tables, ids, scale=0.3, most_keys=34)
    assert_close(got, case_definition(case, query, member, 0.3, None), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kv_heads", "kept", "streaming"), [(6, 2, (1, 4)), (3, 2, (1, 4, 5)), (3, 3, (1, 4))]
)
def test_rows_that_change_while_their_tables_are_in_use(kv_heads, kept, streaming, monkeypatch):
    """Online memberships: kernels' tables are made first, and nobody knows who will be where."""
    monkeypatch.setattr(Membership, "known_rows", None)
    others = torch.tensor([head for head in range(6) if head not in streaming])

    def members(batch):
        rep = torch.arange(6).repeat(batch, 1)
        rep[:, others] = others[random_representatives(len(others), 2, batch)]
        return Membership.from_representatives(rep, 2, kv_heads, kept, streaming)

    tables, new, ids = members(5), members(2), torch.tensor([3, 0, 1])
    tables = tables.to(DEVICE)
    options = {"page": 16, "local_page": 32, "recent": 6, "sinks": 2, "dim": 32, "value_dim": 32}
    query = torch.randn(3, 6, 32)
    for changed in (False, True):
        if changed:
            update_tables(tables, torch.tensor([3, 1], device=DEVICE), new.to(DEVICE))
        case = written(tables, [3, 40, 25], torch.float32, ids=ids, **options)
        member = tables.to("cpu").select(ids)
        got = attend(case, query, member, tables, ids, scale=0.3)
        assert_close(got, case_definition(case, query, member, 0.3, None), atol=2e-5, rtol=0)


@pytest.mark.parametrize("stored", [None, FLOAT8])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "streaming"),
    [(9, 9, 4, 0), (9, 9, 3, 4), (9, 3, 1, 7), (4, 4, 0, 4)],
)
def test_write_is_the_references(heads, kv_heads, clusters, streaming, shared, stored):
    """Some tokens have only one place, or none."""
    tokens, dim, value_dim = 11, 48, 40
    member = random_membership(heads, clusters, 1 if shared else 3, kv_heads, streaming)
    # numbers that 8 bits hold: the interpreter rounds others in another way
    key, value = (torch.randint(-15, 16, (tokens, kv_heads, n)).float() for n in (dim, value_dim))
    slots, local_slots = torch.randperm(40)[:tokens], torch.randperm(96)[:tokens]
    slots[[4, 7]], local_slots[[5, 7]] = -1, -1
    ids = None if shared else torch.randint(0, 3, (tokens,), dtype=torch.int32)
    kept, values = member.kept_keys, member.kept_values
    results = []
    for function, device in ((launch_paged, DEVICE), (write_paged, "cpu")):
        pages = [
            torch.zeros(count, page, n, size).to(stored or torch.float32).to(device)
            for count, page, n, size in (
                (5, 8, kept, dim), (5, 8, values, value_dim),
                (2, 48, kv_heads - kept, dim), (2, 48, kv_heads - values, value_dim),
            )
        ]  # fmt: skip
        local = LocalPages(*pages[2:], torch.zeros(1, 1, dtype=torch.int32), 4, 1)
        function(
            key.to(device), value.to(device), *pages[:2], slots.to(device), member.to(device),
            None if ids is None else ids.to(device), local,
            local_slot_mapping=local_slots.to(device),
            scales=(1.0, 1.0) if stored is None else (0.5, 4.0),
        )  # fmt: skip
        results.append(pages)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.float().cpu(), want.float())


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize(("clusters", "streaming"), [(3, 4), (0, 12)])
def test_local_pages_replay_in_a_cuda_graph(clusters, streaming):
    """A step writes and attends; nothing is read on the host, so a replay sees new contents."""
    lengths, dim = [200, 77], 64
    member = random_membership(12, clusters, 2, streaming=streaming)
    case = written(
        member, lengths, torch.float32, page=64, local_page=48, recent=32, sinks=4, dim=dim,
        value_dim=dim,
    )  # fmt: skip
    there, offset = member.to(DEVICE), head_offsets(None, member).to(DEVICE)
    query = torch.randn(2, 12, dim, device=DEVICE)
    key, value = torch.randn(2, 2, 12, dim, device=DEVICE)
    last = torch.tensor(lengths) - 1
    slots, local_slots = (
        (table.cpu()[[0, 1], last // page] * page + last % page).long().to(DEVICE)
        for table, page in ((case.table, 64), (case.local.block_table, 48))
    )
    ids = torch.arange(2, dtype=torch.int32, device=DEVICE)

    def step():
        launch_paged(
            key, value, *case.pages, slots, there, ids, case.local, local_slot_mapping=local_slots
        )
        return kernels.paged_decode(
            query, *case.pages, case.table, there, lengths=case.lengths, local=case.local,
            offset=offset, scale=0.2,
        )[0]  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(2):
        for x in (query, key, value):
            x.normal_()
        graph.replay()
        for row, n in enumerate(lengths):
            case.keys[row][:, n - 1], case.values[row][:, n - 1] = key[row].cpu(), value[row].cpu()
        want = case_definition(case, query, member, 0.2, None)
        assert_close(got.double().cpu(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "sinks"),
    [(4, 2, 128, 24, 4), (3, 3, 40, 24, 4), (12, 3, 128, 128, 0), (17, 1, 64, 64, 20)],
)
def test_heads_that_all_stream_see_windows_longer_than_a_step(
    heads, kv_heads, dim, value_dim, sinks, dtype
):
    """A program reads K and V of a K/V head once for all its query heads."""
    member = random_membership(heads, 0, 4, kv_heads, heads)
    case = written(
        member, [700, 300, 0, 3], dtype, page=16, local_page=48, recent=290, sinks=sinks, dim=dim,
        value_dim=value_dim,
    )  # fmt: skip
    query = torch.randn(4, heads, dim).to(dtype)
    got = attend(case, query, member, scale=0.2, most_keys=700, softcap=3.0 if sinks else None)
    want = case_definition(case, query, member, 0.2, None, 3.0 if sinks else None)
    # weights are not rounded to the dtype of V, only outputs are
    assert_close(got, want, atol={2: 4e-3, 4: 2e-5}[dtype.itemsize], rtol=4e-3)
