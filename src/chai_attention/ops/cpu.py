"""The CPU's backend: blocks of matrix products or torch's fused attention (`choice`)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from chai_attention.ops import choice, local_decode, packed
from chai_attention.ops.call import AttentionCall, DenseKV, PackedQueries, PagedKV
from chai_attention.ops.reference_backend import ReferenceBackend
from chai_attention.ops.rolling_buffer import RollingBuffer

logger = logging.getLogger("chai_attention")


class CpuBackend(ReferenceBackend):
    """What is faster here; packed sequences and those in pages go one by one."""

    name = "cpu"

    def attend(
        self, query: Tensor, kv: DenseKV, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """`blocked`, `fused` or `dense`, which differ by rounding only."""
        attend = choice.fastest(query, kv, call)
        logger.debug("on the CPU: %s", attend.__name__)
        return attend(query, kv, call)

    def decode_recent(
        self, query: Tensor, kv: DenseKV, ring: RollingBuffer, call: AttentionCall
    ) -> Tensor:
        """`local_decode`: one softmax over far and local scores."""
        return local_decode.decode_recent(query, kv, ring, call)

    def paged_decode(
        self, query: Tensor, pages: PagedKV, call: AttentionCall, out: Tensor
    ) -> Tensor | None:
        """`packed.attend`: sequences of one query each."""
        starts = torch.arange(len(query) + 1, dtype=torch.int32)
        return packed.attend(self, PackedQueries(query, starts, 1), pages, call, out, None)
