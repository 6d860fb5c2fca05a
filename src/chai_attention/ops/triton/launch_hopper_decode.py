"""Launches the Hopper decode kernel over pages, and that of the nearest keys beside it."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from chai_attention.ops.call import AttentionCall, PagedKV
from chai_attention.ops.triton.checks import by_row, page_strides
from chai_attention.ops.triton.decode import padded
from chai_attention.ops.triton.device import capability
from chai_attention.ops.triton.head_tiles import HeadTiles
from chai_attention.ops.triton.hopper_decode import BLOCK, parts
from chai_attention.ops.triton.launch_hopper import fetchable, tiles_of
from chai_attention.ops.triton.local_decode import local_block, local_parts
from chai_attention.ops.triton.sizes import cdiv

RESIDENT = 2  # programs on a processor: one reads while the other begins or ends
RING_BYTES = 6 * 16384  # of tiles in a program's shared memory, of which a processor has 227 KiB
# of a thread on average: two programs leave a third of a processor's registers to what runs beside
# them, the local keys and the merge
REGISTERS = 80
DIMS = (128,)  # 64 is right too (see the tests), and was not timed
LOCAL_WARPS = 4


def fits(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None) -> bool:
    """Whether this kernel can run these pages: whole blocks of keys, 16 bits, aligned."""
    if table is None or capability(query.device)[0] != 9:
        return False
    dim, page = query.shape[-1], key.shape[1]
    return (
        query.element_size() == 2
        and dim in DIMS
        and key.shape[-1] == value.shape[-1] == dim
        and page % BLOCK.value == 0
        and fetchable(key, value)
    )


def launch_parts(
    query: Tensor,
    pages: PagedKV,
    call: AttentionCall,
    head_tiles: HeadTiles,
    heads: Tensor,
    acc: Tensor,
    sums: Tensor,
) -> None:
    """Write partial sums of all head tiles.

    Args:
        query: ``[B, k or H, D]``.
        pages: K and V.
        call: how.
        head_tiles: the work; some of it sees far keys.
        heads: ``[R, head tiles]`` int32, the row of ``query`` of each head tile.
        acc: ``[B, head tiles, splits (+ 1 with a window), M * D]`` float32, for sums of V.
        sums: ``[B, head tiles, splits (+ M with a window), 2]`` float32, for maxima and weights.
    """
    key, value, local, softcap = pages.key, pages.value, pages.window, call.softcap
    batch, _, dim = query.shape
    members, page, has_local = head_tiles.members, key.shape[1], local is not None
    splits = acc.shape[2] - has_local
    lengths, table = by_row(pages.seq_lens), by_row(pages.block_table)
    ids = by_row(call.membership_ids)
    parts[(batch * (head_tiles.count - head_tiles.streaming) * splits,)](
        _tiles(key), _tiles(value), query, lengths, table, ids, heads, head_tiles.key,
        head_tiles.value, acc, sums, call.scale, softcap or 1.0, head_tiles.count,
        head_tiles.streaming, splits,
        0 if local is None else local.recent, query.stride(0), query.stride(1), table.stride(0),
        head_tiles.stride,
        D=dim, M=members, PAGE=page, SLOTS=RING_BYTES // (BLOCK.value * dim * 2),
        SINKS=0 if local is None else local.sinks, HAS_IDS=ids is not None,
        HAS_LOCAL=has_local, HAS_SOFTCAP=softcap is not None, num_warps=4,
        maxnreg=REGISTERS,
    )  # fmt: skip
    if local is not None:
        local_table = by_row(local.block_table)
        keys = local.recent + local.sinks
        block = local_block(keys, padded(dim), LOCAL_WARPS)
        local_parts[(batch * head_tiles.count * members,)](
            query, key, value, lengths, table, ids, head_tiles.value, head_tiles.head, acc, sums,
            local.key, local.value, local_table, call.membership.key_place,
            call.scale, softcap or 1.0, head_tiles.count, splits, local.recent, key.shape[2],
            value.shape[2],
            query.stride(0), query.stride(1), *page_strides(key), *page_strides(value),
            table.stride(0), head_tiles.stride, local_table.stride(0), *page_strides(local.key),
            *page_strides(local.value),
            D=dim, DP=dim, DV=dim, DVP=dim, M=members, PAGE=page,
            GROUP=call.membership.group_size, KV_HEADS=call.membership.kv_heads, LOCAL=block,
            STEPS=cdiv(keys, block), LOCAL_PAGE=local.page,
            SINKS=local.sinks, HAS_IDS=ids is not None, HAS_SOFTCAP=softcap is not None,
            num_warps=LOCAL_WARPS, launch_pdl=True,
        )  # fmt: skip


def _tiles(pages: Tensor) -> TensorDescriptor:
    """Describe pages ``[P, N, heads, D]`` to the tensor memory accelerator, in tiles of a head."""
    return tiles_of(pages.transpose(1, 2), [1, 1, BLOCK.value, pages.shape[3]])
