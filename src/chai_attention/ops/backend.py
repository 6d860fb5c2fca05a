"""The contract of all implementations of clustered attention."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV, Probe
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.windowed import WindowTables


class AttentionBackend(ABC):
    """One implementation of the operations of `ops.dispatch`, which says what they mean.

    There is one object of each: the reference (any device), the CPU's, Triton's and, with more
    kernels, Hopper's. Arguments have been checked.

    Attributes:
        name: for the log.
        missing: why it has to be the reference; None for one of the fast ones.
    """

    name: str
    missing: str | None = None

    @abstractmethod
    def attend(
        self, query: Tensor, kv: DenseKV, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by clusters; see `dispatch.attention`."""

    @abstractmethod
    def attend_window(
        self,
        query: Tensor,
        kv: DenseKV,
        local: LocalKeys,
        tables: WindowTables,
        call: AttentionCall,
    ) -> Tensor:
        """Attend with an exact window; see `dispatch.windowed_attention`."""

    @abstractmethod
    def decode_recent(
        self, query: Tensor, kv: DenseKV, ring: RollingBuffer, call: AttentionCall
    ) -> Tensor:
        """Decode with an exact window in fixed memory; see `dispatch.decode_recent`."""

    @abstractmethod
    def paged_decode(
        self, query: Tensor, pages: PagedKV, call: AttentionCall, out: Tensor
    ) -> Tensor | None:
        """Decode over pages into ``out [B, H, Dv]``, return lse: see `dispatch.paged_decode`."""

    @abstractmethod
    def packed_prefill(
        self,
        queries: PackedQueries,
        kv: PagedKV | PackedKV,
        call: AttentionCall,
        out: Tensor,
        probe: Probe | None,
    ) -> Tensor | None:
        """Prefill into ``out [T, H, Dv]``; return the lse.

        See `dispatch.paged_prefill` and `varlen_prefill`.
        """

    def attend_far(
        self, query: Tensor, kv: DenseKV, tables: WindowTables, call: AttentionCall
    ) -> tuple[Tensor, Tensor] | None:
        """Clustered attention of the last queries to the far keys alone.

        Without its last w keys, the causal rule of clustered attention hides just what is local.

        Args:
            query: ``[B, H, Q, D]``, all heads.
            kv: all keys.
            tables: which of them are far.
            call: as of the whole attention.

        Returns:
            ``out [B, Q', H', Dv]`` of the last Q' queries, those before see none, and of the heads
            that see far keys; and ``lse [B, k, Q']``. None if there are no far keys.
        """
        member = call.membership
        if tables.far is None or member.far is None:
            return None
        far = DenseKV(kv.key[:, :, tables.far], kv.value[:, :, tables.far], valid=tables.far_valid)
        late = query[:, :, max(0, query.shape[2] - far.key.shape[2]) :]
        heads = member.slot_heads[:, :, None, None].expand(-1, -1, *late.shape[2:])
        far_call = AttentionCall(member.far, call.scale, call.softcap, return_lse=True)
        out, lse = self.attend(late.gather(1, heads), far, far_call)
        assert lse is not None
        return out, lse
