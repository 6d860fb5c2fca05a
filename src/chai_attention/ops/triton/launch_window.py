"""Launches Hopper prefill with an exact window over pages."""

from __future__ import annotations

from torch import Tensor

from chai_attention.ops.call import AttentionCall, PackedQueries, PagedKV
from chai_attention.ops.triton.device import processors
from chai_attention.ops.triton.head_tiles import HeadTiles
from chai_attention.ops.triton.hopper_paged_window import prefill_paged_window as _kernel
from chai_attention.ops.triton.hopper_pages import BOX, COLUMNS
from chai_attention.ops.triton.hopper_work import plan
from chai_attention.ops.triton.launch_hopper import (
    BLOCK,
    ROWS,
    SINKS,
    STAGES,
    box_of,
    fits,
    tiles_of,
)


def fits_pages(query: Tensor, kv: PagedKV, members: int) -> bool:
    """Whether the kernel takes these."""
    near = kv.window
    assert near is not None
    pages = [x for x in (kv.key, kv.value, near.key, near.value) if x.shape[2]]
    return (
        near.sinks <= SINKS
        and kv.key.shape[1] % BOX.value == near.page % BOX.value == 0
        and all(fits(query, x, x, members) for x in pages)
    )


def prefill_paged_window(
    queries: PackedQueries, kv: PagedKV, call: AttentionCall, head_tiles: HeadTiles, out: Tensor
) -> None:
    """Write ``out [T, H, Dv]`` of packed sequences behind their context in pages.

    Args:
        queries: of all heads.
        kv: far and near pages whose sizes are multiples of 16, with no more than `SINKS` sinks.
        call: how.
        head_tiles: the work, streaming heads' too.
        out: any strides but the last.
    """
    near, member, offset, rows = kv.window, call.membership, call.offset, call.membership_ids
    assert near is not None
    starts, table, query = queries.query_start_loc, kv.block_table, queries.query
    batch, (total, _, dim) = starts.shape[0] - 1, query.shape
    pages = [x.transpose(1, 2) for x in (kv.key, kv.value, near.key, near.value)]
    some = next(x for x in pages if x.shape[1])
    # what has no heads is described to the kernel as something else, and not read
    far_key, far_value, near_key, near_value = (x if x.shape[1] else some for x in pages)
    size = box_of(kv.key.shape[1])
    # parts of a block have to be as wide as the swizzle
    box = [1, 1, size, dim if size == BLOCK else COLUMNS.value]
    little = [1, 1, BOX.value, COLUMNS.value]
    programs = (total // (2 * ROWS) + batch) * head_tiles.count
    _kernel[(min(processors(out.device), programs),)](
        tiles_of(query.transpose(0, 1)[None], [1, 1, ROWS, dim]),
        tiles_of(far_key, box), tiles_of(far_value, box),
        tiles_of(far_key, little), tiles_of(far_value, little),
        tiles_of(near_key, little), tiles_of(near_value, little),
        plan(head_tiles, starts, rows, 2 * ROWS), starts, kv.seq_lens, table,
        near.block_table, rows, *head_tiles.tables,
        member.key_place, member.value_place, offset, out,
        call.scale, near.recent, head_tiles.count, head_tiles.streaming, batch,
        member.kept_keys, member.kept_values,
        head_tiles.stride, table.stride(0), near.block_table.stride(0),
        *out.stride()[:2], 0 if offset is None else offset.stride(0),
        ROWS=ROWS, BLOCK=BLOCK, D=dim, M=head_tiles.members, STAGES=STAGES, SINKS=near.sinks,
        SHARED=member.group_size, GROUPS=member.kv_heads, PAGE=kv.key.shape[1],
        NEAR_PAGE=near.page, HAS_ROWS=rows is not None, HAS_OFFSET=offset is not None, num_warps=4,
    )  # fmt: skip
