"""The Hopper decode kernel over pages against the definition, on a Hopper GPU."""

import logging

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.membership import Membership
from chai_attention.ops import AttentionCall, PagedKV
from chai_attention.ops.fp8 import FLOAT8
from chai_attention.ops.triton import launch_decode, launch_hopper_decode
from chai_attention.ops.windowed import head_offsets
from helpers import TOLERANCE, random_membership
from local_pages_cases import case_definition, local_case
from op_calls import dispatched, kernels
from page_writes import launch_paged
from paged_caches import paged_caches

pytestmark = pytest.mark.usefixtures("nan_memory")
hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU: its instructions have no interpreter",
)
LENGTHS = [1, 63, 64, 0, 129, 700]
SHAPES = [  # heads, K/V heads, clusters, head size, page
    (9, 9, 4, 128, 64), (12, 12, 1, 64, 64), (32, 32, 5, 128, 128), (12, 4, 5, 128, 64),
    (8, 8, 8, 64, 192), (32, 32, 4, 128, 64),
]  # fmt: skip


@pytest.fixture
def decode(caplog, monkeypatch):
    """`kernels.paged_decode`, which must take the Hopper kernel, for heads of 64 too."""
    monkeypatch.setattr(launch_hopper_decode, "DIMS", (64, 128))

    def call(*args, **options):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "chai_attention"):
            result = kernels.paged_decode(*args, **options)
        assert ", Hopper" in caplog.text
        return result

    return call


@hopper_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "clusters", "dim", "page"), SHAPES)
def test_pages_are_the_reference(heads, kv_heads, clusters, dim, page, dtype, decode):
    member = random_membership(heads, clusters, len(LENGTHS), kv_heads)
    case = paged_caches(member, LENGTHS, page, dim, dim, dtype, "cuda", one_buffer=True)
    query = torch.randn(len(LENGTHS), heads, dim, dtype=dtype, device="cuda")
    options = {"scale": dim**-0.5, "return_lse": True}
    want, want_lse = dispatched.paged_decode(
        query.double().cpu(), case.keys.double().cpu(), case.values.double().cpu(),
        case.table.cpu(), member, lengths=case.lengths.cpu(), **options,
    )  # fmt: skip
    member = member.to("cuda")
    for part in (query, query.gather(1, member.slot_heads[:, :, None].expand(-1, -1, dim))):
        got, lse = decode(
            part, case.keys, case.values, case.table, member, lengths=case.lengths, **options
        )
        torch.testing.assert_close(got.double().cpu(), want, atol=TOLERANCE[dtype], rtol=0)
        torch.testing.assert_close(lse.cpu(), want_lse, atol=2e-3, rtol=1e-3)


@hopper_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "clusters", "streaming", "dim", "local_page", "recent", "sinks"),
    [(9, 9, 4, 0, 128, 48, 32, 4), (12, 12, 3, 4, 128, 48, 128, 4), (9, 3, 2, 5, 64, 16, 40, 20),
     (12, 4, 2, 3, 128, 64, 1, 0), (6, 6, 1, 2, 64, 32, 33, 65), (32, 32, 8, 12, 128, 48, 128, 4)],
)  # fmt: skip
def test_far_and_local_pages_are_the_definition(
    heads, kv_heads, clusters, streaming, dim, local_page, recent, sinks, dtype, decode
):
    member = random_membership(heads, clusters, len(LENGTHS), kv_heads, streaming).to("cuda")
    case = local_case(
        member, LENGTHS, launch_paged, page=64, local_page=local_page, recent=recent,
        sinks=sinks, dim=dim, value_dim=dim, dtype=dtype, device="cuda",
    )  # fmt: skip
    query, offsets = torch.randn(len(LENGTHS), heads, dim).to(dtype), torch.randn(heads, heads)
    softcap = 5.0 if heads == 9 else None
    got, _ = decode(
        query.cuda(), *case.pages, case.table, member, lengths=case.lengths, local=case.local,
        offset=head_offsets(offsets.cuda(), member), scale=dim**-0.5, softcap=softcap,
    )  # fmt: skip
    want = case_definition(case, query, member.to("cpu"), dim**-0.5, offsets, softcap)
    torch.testing.assert_close(got.double().cpu(), want, atol=TOLERANCE[dtype], rtol=0)


@hopper_only
def test_rows_of_a_table_that_only_the_device_knows(monkeypatch, decode):
    monkeypatch.setattr(Membership, "known_rows", None)
    slots, ids = random_membership(16, 3, 5).to("cuda"), torch.tensor([4, 1, 4], device="cuda")
    member = slots.select(ids).to("cpu")
    case = paged_caches(member, [40, 300, 90], 64, 128, 128, torch.bfloat16, "cuda")
    query = torch.randn(3, 16, 128, dtype=torch.bfloat16, device="cuda")
    want, _ = dispatched.paged_decode(
        query.double().cpu(), case.keys.double().cpu(), case.values.double().cpu(),
        case.table.cpu(), member, lengths=case.lengths.cpu(), scale=0.1,
    )  # fmt: skip
    got, _ = decode(
        query, case.keys, case.values, case.table, slots, lengths=case.lengths, scale=0.1,
        ids=ids.int(), most_keys=320,
    )  # fmt: skip
    torch.testing.assert_close(got.double().cpu(), want, atol=3e-2, rtol=0)


@hopper_only
def test_a_cuda_graph_sees_new_contents_and_repeats_itself():
    """A moving result would be a race."""
    member = random_membership(12, 3, 3, streaming=4).to("cuda")
    case = local_case(
        member, [700, 64, 300], launch_paged, page=64, local_page=48, recent=32, sinks=4,
        dim=128, value_dim=128, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    query = torch.randn(3, 12, 128, dtype=torch.bfloat16, device="cuda")

    def step():
        return kernels.paged_decode(
            query, *case.pages, case.table, member, lengths=case.lengths, local=case.local,
            offset=head_offsets(None, member), scale=0.1,
        )[0]  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for length in (700, 690):
        query.normal_()
        case.lengths[0] = length
        graph.replay()
        first = got.clone()
        if length == 700:
            want = case_definition(case, query.cpu(), member.to("cpu"), 0.1, None)
            torch.testing.assert_close(first.double().cpu(), want, atol=3e-2, rtol=0)
        torch.testing.assert_close(first, step(), atol=0, rtol=0)
        for _ in range(20):
            graph.replay()
            assert torch.equal(first, got)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "clusters", "size", "kernel", "splits"),
    [
        (16, 32, 32, 8, 8192, True, 2),
        (14, 32, 32, 8, 8192, True, 7),
        (1, 32, 32, 8, 32768, True, 16),  # one program on a processor
        (1, 32, 8, 8, 32768, True, 33),
        (16, 32, 8, 8, 8192, True, 8),
        (1, 32, 32, 4, 32768, True, 33),
        (14, 32, 32, 4, 8192, True, 9),  # 8 V heads for each K head
    ],
)
def test_which_kernel_and_how_many_parts(
    batch, heads, kv_heads, clusters, size, kernel, splits, monkeypatch
):
    """On a processor like an H100 or an H200; nothing is computed."""
    monkeypatch.setattr(launch_decode, "processors", lambda device: 132)
    monkeypatch.setattr(launch_hopper_decode, "capability", lambda device: (9, 0))
    rep = torch.arange(heads) // (heads // clusters) * (heads // clusters)
    member = Membership.from_representatives(rep.expand(batch, -1), kv_heads=kv_heads)
    pages = torch.empty(1, 64, kv_heads, 128, dtype=torch.bfloat16)
    kv = PagedKV(
        pages[:, :, : member.kept_keys], pages, torch.zeros(batch, size // 64, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int32),
    )  # fmt: skip
    query = torch.empty(batch, heads, 128, dtype=torch.bfloat16)
    head_tiles = launch_decode.head_tiles_for(query, kv, member)
    grid = launch_decode.choose_grid(query, kv, AttentionCall(member, 1.0), head_tiles)
    assert (grid.tensor_cores, grid.splits) == (kernel, splits)


def test_what_the_kernel_does_not_take(monkeypatch):
    monkeypatch.setattr(launch_hopper_decode, "capability", lambda device: (9, 0))
    table = torch.zeros(1, 1, dtype=torch.int32)

    def fits(page=64, dim=128, value_dim=None, dtype=torch.bfloat16, stored=None, spare=0):
        query = torch.zeros(1, 4, dim, dtype=dtype)
        key, value = (
            torch.zeros(2, page, 4, n + spare, dtype=stored or dtype)[..., :n]
            for n in (dim, value_dim or dim)
        )
        return launch_hopper_decode.fits(query, key, value, table)

    taken = ({}, {"page": 192}, {"dtype": torch.float16})
    refused = (
        {"stored": FLOAT8}, {"page": 48}, {"dim": 64}, {"value_dim": 64}, {"spare": 4},
        {"dtype": torch.float32},
    )  # fmt: skip
    assert [fits(**shape) for shape in taken] == [True] * len(taken)
    assert [fits(**shape) for shape in refused] == [False] * len(refused)
    monkeypatch.setattr(launch_hopper_decode, "capability", lambda device: (8, 0))
    assert not fits()
