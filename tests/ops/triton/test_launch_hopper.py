"""What launches of Hopper's kernels make anew, and what calls share; nothing is launched."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.ops.call import AttentionCall, PackedQueries, PagedKV
from chai_attention.ops.local_pages import LocalPages
from chai_attention.ops.triton import launch_hopper
from chai_attention.ops.triton.head_tiles import head_tiles_of
from helpers import random_membership

HEADS, DIM, PAGE, LOCAL = 6, 64, 64, 48
TILES = slice(1, 7)  # of pages, among the kernel's arguments


@pytest.fixture(autouse=True)
def kernels_device():
    """The work list is a launch, too: by Triton's interpreter where there is no GPU."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


class Launches:
    """In a kernel's place, keeps what it is launched with."""

    def __init__(self) -> None:
        self.arguments = []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.arguments.append(args)


@pytest.mark.parametrize("kept", [0, 2])
def test_a_layers_pages_are_described_once(kept, monkeypatch) -> None:
    launched = Launches()
    monkeypatch.setattr(launch_hopper, "_prefill_paged_window", launched)
    streaming = HEADS - 2 if kept else HEADS
    member = random_membership(HEADS, min(2, HEADS - streaming), streaming=streaming)
    head_tiles = head_tiles_of(member, 1)
    far = torch.zeros(2, 3, PAGE, member.kept_keys, DIM, dtype=torch.bfloat16)
    near = torch.zeros(2, 5, LOCAL, HEADS - member.kept_keys, DIM, dtype=torch.bfloat16)
    call = AttentionCall(member, 0.3, offset=torch.zeros(2, HEADS))
    shared = {}
    for step, own in enumerate([shared, shared, None, {}]):
        query = torch.zeros(100 + step, HEADS, DIM, dtype=torch.bfloat16)
        starts = torch.tensor([0, 70, 100 + step], dtype=torch.int32)
        lengths, table = torch.tensor([90, 130]), torch.full((2, 4), step, dtype=torch.int32)
        kv = PagedKV(*far, table, lengths, LocalPages(*near, table, 20, 4), shared=own)
        queries = PackedQueries(query, starts, 70)
        launch_hopper.prefill_paged_window(queries, kv, call, head_tiles, torch.empty_like(query))
    first, again, *anew = (args[TILES] for args in launched.arguments)
    assert all(one is other for one, other in zip(first, again, strict=True))
    for tiles in anew:
        for one, other in zip(first, tiles, strict=True):
            assert one is not other
            assert one.base.data_ptr() == other.base.data_ptr()
            assert (one.shape, one.strides) == (other.shape, other.strides)
            assert (one.block_shape, one.layout) == (other.block_shape, other.layout)
    # queries differ in every step
    assert [args[0].shape[2] for args in launched.arguments] == [100, 101, 102, 103]
