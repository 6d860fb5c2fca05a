"""The parts of a dense call: head tiles, and what is refused."""

import pytest
import torch

from helpers import random_membership

pytest.importorskip("triton")

from chai_attention.ops.triton.head_tiles import head_tiles_of
from op_calls import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("members", [1, 2, 4, 8])
def test_head_tiles_cover_every_head_once(members):
    member = random_membership(12, 5, 4)
    head_tiles = head_tiles_of(member, members)
    for b in range(4):
        heads = sorted(h for h in head_tiles.head[b].flatten().tolist() if h >= 0)
        assert heads == list(range(12))
        for n in range(head_tiles.count):
            for head, place in zip(head_tiles.head[b, n], head_tiles.value[b, n], strict=True):
                if head >= 0:
                    assert member.slot[b, head] == head_tiles.slot[b, n]
                    assert member.value_slot[b, head] == place
                    assert member.key_slot[b, member.slot[b, head]] == head_tiles.key[b, n]


def test_what_has_no_kernel_is_refused():
    member = random_membership(4, 2).to(DEVICE)
    q, k, v = (torch.randn(1, n, 3, 8, dtype=torch.float64, device=DEVICE) for n in (2, 2, 4))
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        kernels.attention(q, k, v, member, scale=1.0)
    q, k, v = (torch.randn(1, n, 3, 300, device=DEVICE) for n in (2, 2, 4))
    with pytest.raises(ValueError, match="300 is more than"):
        kernels.attention(q, k, v, member, scale=1.0)
