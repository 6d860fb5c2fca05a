"""The CPU's backend: blocks of matrix products or torch's fused attention (`choice`)."""

from __future__ import annotations

import logging

from torch import Tensor

from chai_attention.ops import choice, near_decode
from chai_attention.ops.call import AttentionCall, DenseKV
from chai_attention.ops.reference_backend import ReferenceBackend
from chai_attention.ops.ring import NearRing

logger = logging.getLogger("chai_attention")


class CpuBackend(ReferenceBackend):
    """What is faster here; packed sequences go one by one, as in the reference."""

    name = "cpu"

    def attend(
        self, query: Tensor, kv: DenseKV, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """`blocked`, `fused` or `dense`, which differ by rounding only."""
        attend = choice.fastest(query, kv, call)
        logger.debug("on the CPU: %s", attend.__name__)
        return attend(query, kv, call)

    def decode_recent(
        self, query: Tensor, kv: DenseKV, ring: NearRing, call: AttentionCall
    ) -> Tensor:
        """`near_decode`: one softmax over far and near scores."""
        return near_decode.decode_recent(query, kv, ring, call)
