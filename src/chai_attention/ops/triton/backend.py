"""CUDA's backends: Triton's kernels, and those that only Hopper GPUs run beside them.

Nothing is read on the host and grids depend on shapes alone, so that calls can be captured in CUDA
graphs (after one call outside, which makes the tables of the membership).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.backend import AttentionBackend
from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV, Probe
from chai_attention.ops.local import LocalKeys
from chai_attention.ops.rolling_buffer import RollingBuffer
from chai_attention.ops.triton import (
    context_parts,
    launch_decode,
    launch_hopper,
    launch_prefill,
)
from chai_attention.ops.triton.checks import check
from chai_attention.ops.triton.device import capability
from chai_attention.ops.triton.head_tiles import HeadTiles, head_tiles_of, natural_head_tiles
from chai_attention.ops.triton.local_prefill import merge_local
from chai_attention.ops.triton.packed_window import prefill_packed_window
from chai_attention.ops.windowed import WindowTables

logger = logging.getLogger("chai_attention")


def head_tiles_for(kv: PagedKV | PackedKV, member: Membership, members: int) -> HeadTiles:
    """How heads are dealt out, for the order that K and V are in."""
    natural = isinstance(kv, PackedKV) and kv.natural_order
    return (natural_head_tiles if natural else head_tiles_of)(member, members)


def has_window(kv: PagedKV | PackedKV) -> bool:
    """Whether the last keys are every head's own."""
    return kv.window is not None if isinstance(kv, PagedKV) else kv.recent > 0


def _unlike_pages(kv: PagedKV) -> tuple[Tensor, ...]:
    """Pages to check, of which one stands for all if they are alike."""
    local = kv.window
    pages = (kv.key, kv.value, *(() if local is None else (local.key, local.value)))
    alike = {(x.dtype, x.shape[-1], x.stride(-1)) for x in pages}
    return pages[:1] if len(alike) == 1 else pages


def packed_members(queries: PackedQueries, kv: PagedKV | PackedKV, member: Membership) -> int:
    """Members of a head tile; with a window a program holds one's sums beside those of all."""
    members = launch_prefill.heads_per_tile_for(queries.query, kv.value, member)
    return min(2, members) if has_window(kv) else members


def shares_contexts(queries: PackedQueries, kv: PagedKV | PackedKV, member: Membership) -> bool:
    """Whether contexts in parts are faster than Hopper's kernel, which has none."""
    if isinstance(kv, PackedKV) or queries.max_seqlen_q > context_parts.MOST_QUERIES:
        return False
    head_tiles = head_tiles_for(kv, member, packed_members(queries, kv, member))
    rows = launch_prefill.rows_of(queries)
    parts = context_parts.count_of(queries, kv, member, head_tiles, rows)
    return parts >= context_parts.WORTH_PARTS


class TritonBackend(AttentionBackend):
    """Triton's kernels."""

    name = "triton"

    def attend(
        self, query: Tensor, kv: DenseKV, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """Decode of one query, else prefill."""
        if query.shape[2] == 1:
            return launch_decode.dense_decode(query, kv, call)
        check(query, kv.key, kv.value)
        member, (batch, clusters, queries, _) = call.membership, query.shape
        shape = (batch, queries, member.heads, kv.value.shape[3])
        out = torch.empty(shape, dtype=kv.value.dtype, device=query.device)
        lse = None
        if call.return_lse:
            lse = torch.empty(batch, clusters, queries, dtype=torch.float32, device=query.device)
        head_tiles = head_tiles_of(
            member, launch_prefill.heads_per_tile_for(query, kv.value, member)
        )
        launch = self.dense_launcher(query, kv, call, head_tiles.members)
        launch(query, kv, call, head_tiles, out, lse)
        return out, lse

    def dense_launcher(
        self, query: Tensor, kv: DenseKV, call: AttentionCall, members: int
    ) -> Callable[..., None]:
        """What writes the output of several queries per sequence."""
        return launch_prefill.dense_prefill

    def attend_window(
        self,
        query: Tensor,
        kv: DenseKV,
        local: LocalKeys,
        tables: WindowTables,
        call: AttentionCall,
    ) -> Tensor:
        """Far keys by `attend`, which `local_prefill` joins with local ones."""
        check(query, kv.key, kv.value, *local)
        far = self.attend_far(query, kv, tables, call)
        return merge_local(query, local, tables, far, call)

    def decode_recent(
        self, query: Tensor, kv: DenseKV, ring: RollingBuffer, call: AttentionCall
    ) -> Tensor:
        """Two launches."""
        return launch_decode.ring_decode(query, kv, ring, call)

    def paged_decode(
        self, query: Tensor, pages: PagedKV, call: AttentionCall, out: Tensor
    ) -> Tensor | None:
        """Two launches; three with a window on Hopper GPUs."""
        return launch_decode.paged_decode(query, pages, call, out)

    def packed_prefill(
        self,
        queries: PackedQueries,
        kv: PagedKV | PackedKV,
        call: AttentionCall,
        out: Tensor,
        probe: Probe | None,
    ) -> Tensor | None:
        """One launch for all sequences, and one more for the probe."""
        query, lse = queries.query, None
        if call.return_lse:
            shape = (query.shape[0], call.membership.clusters)
            lse = torch.empty(shape, dtype=torch.float32, device=query.device)
        if isinstance(kv, PackedKV):
            check(query, out, kv.key, kv.value)
        else:
            check(query, out, pages=kv.once(_unlike_pages))
        if not query.shape[0]:
            return lse
        if has_window(kv):
            self.window_prefill(queries, kv, call, out)
        else:
            member = call.membership
            members = packed_members(queries, kv, member)
            head_tiles = head_tiles_for(kv, member, members)
            launch = self.packed_launcher(queries, kv, call, members)
            launch(queries, kv, call, head_tiles, out, lse)
        if probe is not None:
            lengths = kv.seq_lens if isinstance(kv, PagedKV) else None
            check(*probe[:3], out)
            launch_prefill.probe_prefill(probe, queries, lengths, call, out)
        return lse

    def packed_launcher(
        self, queries: PackedQueries, kv: PagedKV | PackedKV, call: AttentionCall, members: int
    ) -> Callable[..., None]:
        """What writes the output of packed sequences without a window."""
        return launch_prefill.packed_prefill

    def window_prefill(
        self, queries: PackedQueries, kv: PagedKV | PackedKV, call: AttentionCall, out: Tensor
    ) -> None:
        """Write ``out`` of packed sequences with a window."""
        member = call.membership
        members = packed_members(queries, kv, member)
        prefill_packed_window(queries, kv, call, head_tiles_for(kv, member, members), out)


class HopperBackend(TritonBackend):
    """Kernels for the tensor cores of Hopper GPUs, where they take the shape; else Triton's."""

    name = "hopper"

    def dense_launcher(
        self, query: Tensor, kv: DenseKV, call: AttentionCall, members: int
    ) -> Callable[..., None]:
        """By two warpgroups that attend and one warp that fetches."""
        if (
            kv.lengths is None
            and kv.valid is None
            and call.softcap is None
            and launch_hopper.LEAST_QUERIES <= query.shape[2] <= kv.key.shape[2]
            and launch_hopper.fits(query, kv.key, kv.value, members)
        ):
            logger.debug("Hopper prefill kernel: %d members a program", members)
            return launch_hopper.prefill
        return super().dense_launcher(query, kv, call, members)

    def attend_window(
        self,
        query: Tensor,
        kv: DenseKV,
        local: LocalKeys,
        tables: WindowTables,
        call: AttentionCall,
    ) -> Tensor:
        """Far and local keys in one launch."""
        member = call.membership
        if (
            call.softcap is None
            and not tables.padded
            and tables.sinks <= launch_hopper.SINKS
            and query.shape[2] >= launch_hopper.LEAST_QUERIES
        ):
            check(query, kv.key, kv.value, *local)
            members = launch_hopper.window_members(query, kv.value, member)
            far = None
            if tables.far is not None and member.far is not None:
                far = DenseKV(kv.key[:, :, tables.far], kv.value[:, :, tables.far])
            if launch_hopper.fits(query, *local, members) and (
                far is None or launch_hopper.fits(query, far.key, far.value, members)
            ):
                logger.debug("Hopper prefill kernel with a window: %d members a program", members)
                head_tiles = head_tiles_of(member, members)
                return launch_hopper.prefill_window(query, far, local, tables, call, head_tiles)
        return super().attend_window(query, kv, local, tables, call)

    def packed_launcher(
        self, queries: PackedQueries, kv: PagedKV | PackedKV, call: AttentionCall, members: int
    ) -> Callable[..., None]:
        """The same kernel as of `dense_launcher`."""
        if (
            call.softcap is None
            and queries.max_seqlen_q >= launch_hopper.LEAST_QUERIES
            and launch_hopper.fits(queries.query, kv.key, kv.value, members)
            and (call.return_lse or not shares_contexts(queries, kv, call.membership))
        ):
            logger.debug("packed Hopper prefill kernel: %d members a program", members)
            return launch_hopper.prefill_packed
        return super().packed_launcher(queries, kv, call, members)

    def window_prefill(
        self, queries: PackedQueries, kv: PagedKV | PackedKV, call: AttentionCall, out: Tensor
    ) -> None:
        """One kernel for pages, another one without context."""
        query, member = queries.query, call.membership
        if (
            call.softcap is None
            and queries.max_seqlen_q >= launch_hopper.LEAST_QUERIES
            and not shares_contexts(queries, kv, member)
        ):
            members = launch_hopper.window_members(query, kv.value, member)
            text = "packed Hopper prefill kernel with a window%s: %d members a program"
            if isinstance(kv, PagedKV):
                if launch_hopper.fits_pages(query, kv, members):
                    logger.debug(text, ", paged", members)
                    head_tiles = head_tiles_of(member, members)
                    launch_hopper.prefill_paged_window(queries, kv, call, head_tiles, out)
                    return
            elif kv.sinks <= launch_hopper.SINKS and launch_hopper.fits(
                query, kv.key, kv.value, members
            ):
                logger.debug(text, "", members)
                head_tiles = natural_head_tiles(member, members)
                launch_hopper.prefill_packed_window(queries, kv, call, head_tiles, out)
                return
        super().window_prefill(queries, kv, call, out)


TRITON, HOPPER = TritonBackend(), HopperBackend()


def of_device(device: torch.device) -> TritonBackend:
    """Return the backend with the kernels that a device can run."""
    return HOPPER if capability(device)[0] == 9 else TRITON
