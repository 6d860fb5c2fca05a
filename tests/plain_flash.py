"""Stand-ins for vLLM's FlashAttention 3, which needs a GPU: the same calls, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def schedule_size(batch: int) -> int:
    """A counter, and four numbers for each request, of which there are multiples of four."""
    return 1 + 4 * (-(-batch // 4) * 4)


def plain_flash(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    softcap: float,
    scheduler_metadata: Tensor | None,
    num_splits: int,
    fa_version: int,
) -> None:
    """What `flash_attn_varlen_func` computes, one query head of one request at a time."""
    assert causal
    assert fa_version == 3
    assert q.stride(-1) == out.stride(-1) == 1
    if scheduler_metadata is not None:
        assert scheduler_metadata.shape == (schedule_size(len(seqused_k)),)
    starts, group = cu_seqlens_q.tolist(), q.shape[1] // k.shape[2]
    for row, length in enumerate(seqused_k.tolist()):
        new = slice(starts[row], starts[row + 1])
        queries = new.stop - new.start
        assert queries <= max_seqlen_q
        assert length <= max_seqlen_k
        position = torch.arange(length)
        page, at = block_table[row, position // k.shape[1]].long(), position % k.shape[1]
        hidden = position > torch.arange(length - queries, length)[:, None]
        for head in range(q.shape[1]):
            keys, values = (x[page, at, head // group].double() for x in (k, v))
            scores = q[new, head].double() @ keys.T * softmax_scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[new, head] = (scores.masked_fill(hidden, -torch.inf).softmax(1) @ values).to(q)


class Planner:
    """In place of vLLM's ``get_scheduler_metadata``: the number of the call, all over."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> Tensor:
        self.asked.append(options)
        size = schedule_size(options["batch_size"])
        return torch.full((size,), len(self.asked), dtype=torch.int32)
