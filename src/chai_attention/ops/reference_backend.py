"""The reference as a backend: readable PyTorch, for any device and whatever has no kernel."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from chai_attention.ops import packed, paged, reference
from chai_attention.ops.backend import AttentionBackend
from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV, Probe
from chai_attention.ops.dense import torch_attention
from chai_attention.ops.local import Far, LocalKeys, band_attention
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.windowed import WindowTables

SCORES = 1 << 28  # of all heads that exist at a time, unless one query has more: 1 GB
_warned: set[str] = set()


class ReferenceBackend(AttentionBackend):
    """`ops.reference`, in blocks of queries, so that scores of long texts stay few.

    Args:
        missing: what there is no kernel for, which is warned of once.
    """

    name = "reference"

    def __init__(self, missing: str | None = None):
        self.missing = missing

    def attend(
        self, query: Tensor, kv: DenseKV, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """`reference.clustered_attention`, whose results these are."""
        key, value, lengths = kv.key, kv.value, kv.lengths
        batch, queries, size = query.shape[0], query.shape[2], key.shape[2]
        if self.missing is not None:
            _warn_slow(self.missing, query, kv, call)
        if lengths is None:
            lengths = torch.full((batch,), size, device=key.device)
        else:  # unused capacity may hold anything, NaN too
            value = paged.hide_spare(value, lengths)
        step = queries_at_once(batch, call.membership.heads, size)
        outs, sums = [], []
        for start in range(0, queries, step):
            stop = min(start + step, queries)
            # a block's queries are the last ones of a shorter sequence
            out, lse = reference.clustered_attention(
                query[:, :, start:stop], key, value, call.membership, scale=call.scale,
                lengths=lengths - (queries - stop), valid=kv.valid, softcap=call.softcap,
                return_lse=call.return_lse,
            )  # fmt: skip
            outs.append(out)
            sums.append(lse)
        known = [lse for lse in sums if lse is not None]
        return torch.cat(outs, 1), torch.cat(known, 2) if known else None

    def attend_window(
        self,
        query: Tensor,
        kv: DenseKV,
        local: LocalKeys,
        tables: WindowTables,
        call: AttentionCall,
    ) -> Tensor:
        """Far keys by `attend`, which local ones join as `local.band_attention` says."""
        member, offset = call.membership, call.offset
        if _only_streams(tables, call):
            return self._beside_streaming(query, kv, local, tables, call)
        far = None
        found = self.attend_far(query, kv, tables, call)
        if found is not None:
            out, lse = found
            lse = lse.gather(1, member.slot[:, :, None].expand(-1, -1, lse.shape[2]))
            seers = list(member.far_heads) if member.streaming else None
            far = Far(out, lse if offset is None else lse + offset[:, :, None], seers)
        return band_attention(query, local, tables, far, call)

    def _beside_streaming(
        self,
        query: Tensor,
        kv: DenseKV,
        local: LocalKeys,
        tables: WindowTables,
        call: AttentionCall,
    ) -> Tensor:
        """`attend_window` where `_only_streams`: to all other heads there is no window."""
        member = call.membership
        assert member.far is not None
        heads, streams = list(member.far_heads), list(member.streaming)
        groups = member.removed_value_heads[0]
        far_call = AttentionCall(member.far, call.scale, call.softcap)
        whole, _ = self.attend(query[:, heads], DenseKV(kv.key, kv.value), far_call)
        own = LocalKeys(local.key[:, groups], local.value[:, groups])
        some = band_attention(query[:, streams], own, tables, None, call)
        out = whole.new_empty(*whole.shape[:2], member.heads, whole.shape[3])
        for part, numbers in ((whole, heads), (some, streams)):
            out.index_copy_(2, torch.tensor(numbers, device=out.device), part)
        return out

    def decode_recent(
        self, query: Tensor, kv: DenseKV, ring: RollingBuffer, call: AttentionCall
    ) -> Tensor:
        """`reference.decode_recent`."""
        return reference.decode_recent(query, kv, ring, call)

    def paged_decode(
        self, query: Tensor, pages: PagedKV, call: AttentionCall, out: Tensor
    ) -> Tensor | None:
        """`paged.paged_decode`."""
        return paged.paged_decode(query, pages, call, out)

    def packed_prefill(
        self,
        queries: PackedQueries,
        kv: PagedKV | PackedKV,
        call: AttentionCall,
        out: Tensor,
        probe: Probe | None,
    ) -> Tensor | None:
        """One sequence after the other."""
        return packed.attend(self, queries, kv, call, out, probe)


class TorchBackend(ReferenceBackend):
    """Torch's own attention, where no head is clustered."""

    name = "torch"

    def attend(
        self, query: Tensor, kv: DenseKV, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """`dense.torch_attention`."""
        return torch_attention(query, kv, call)


def queries_at_once(batch: int, heads: int, size: int) -> int:
    """How many queries' scores of ``size`` keys exist at a time."""
    return max(1, SCORES // (batch * heads * size))


def _only_streams(tables: WindowTables, call: AttentionCall) -> bool:
    """Whether heads see all keys with their own scores, or local ones only, and none is padding."""
    member, far = call.membership, call.membership.far
    if not member.streaming or tables.padded or far is None or not far.is_identity:
        return False
    return call.offset is None or not bool(call.offset[:, list(member.far_heads)].any())


def _warn_slow(missing: str, query: Tensor, kv: DenseKV, call: AttentionCall) -> None:
    """Say once what the reference costs in place of ``missing``."""
    if missing in _warned:
        return
    _warned.add(missing)
    batch, heads, size = query.shape[0], call.membership.heads, kv.key.shape[2]
    held = 4 * batch * heads * min(query.shape[2], queries_at_once(batch, heads, size)) * size / 1e9
    warnings.warn(
        f"chai-attention runs its reference, because {missing}. It saves K cache but no time: it "
        f"holds the probabilities of all heads, {held:.2g} GB for this call, and "
        "copies V; use the CPU, or CUDA with what is missing, for speed",
        stacklevel=4,
    )
