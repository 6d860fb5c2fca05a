"""Which work of a batch comes first: the list of the head tiles of all rows."""

import pytest
import torch

pytest.importorskip("triton")

from chai_attention.ops.triton.head_tiles import head_tiles_of
from helpers import random_membership

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("members", [1, 2, 4])
@pytest.mark.parametrize(
    ("heads", "clusters", "streaming", "batch"),
    [(12, 3, 0, 1), (12, 3, 5, 3), (9, 0, 9, 2), (32, 8, 12, 40), (7, 7, 0, 2), (8, 2, 1, 300)],
)
def test_streaming_head_tiles_are_listed_behind_the_others(
    heads, clusters, streaming, batch, members
):
    head_tiles = head_tiles_of(random_membership(heads, clusters, batch, None, streaming), members)
    moved = type(head_tiles)(
        *(
            getattr(head_tiles, name).to(DEVICE)
            for name in ("slot", "query", "key", "head", "value")
        ),
        head_tiles.exact,
        head_tiles.streaming,
    )
    work, count = moved.used
    busy = (head_tiles.head[:, :, 0] >= 0).flatten()
    streams = (torch.arange(len(busy)) % head_tiles.count) < head_tiles.streaming
    want = torch.cat([(busy & ~streams).nonzero(), (busy & streams).nonzero(), (~busy).nonzero()])
    assert count.item() == busy.sum()
    assert work.tolist() == want.flatten().tolist()
