"""Decode over paged caches, as servers keep them.

K pages ``[P, N, kept, D]`` and V pages ``[P, N, kept values, Dv]`` hold N tokens each, and may be
views into one buffer in which a page is a run of memory. A block table says which pages a sequence
has. What an exact recent window needs of the other heads stands in pages of its own (`near_pages`).
Pages may be of 8-bit floats (`ops.narrow`), whatever the query is of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops import reference
from chai_attention.ops.near_pages import NearPages, reference_paged_decode


def paged_decode(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    membership: Membership,
    *,
    lengths: Tensor,
    scale: float,
    softcap: float | None = None,
    rows: Tensor | None = None,
    near: NearPages | None = None,
    offset: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    most_keys: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend with one query per sequence; on CUDA nothing is read on the host.

    Args:
        query: ``[B, k, D]`` of the representatives in slot order, or ``[B, H, D]`` of all heads
            in theirs, of which the representatives' are read in place.
        key_pages: ``[P, N, kept_keys, D]`` in the order of ``membership.key_heads``; any strides
            but the last; of the query's dtype or float8_e4m3fn.
        value_pages: ``[P, N, kept_values, Dv]`` in the order of ``membership.value_heads``, of the
            same.
        block_table: ``[B, max_pages]`` int32, the pages of each sequence.
        membership: tables of one row for all sequences, of B, or of any number with ``rows``.
        lengths: ``[B]`` int32, keys of each sequence, the new one included; 0 gives zeros.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
        rows: ``[B]`` int32, each sequence's row of the membership's tables.
        near: exact recent window; needs the query of all heads. A membership with streaming heads
            needs one.
        offset: ``[B, H]`` float32 added to the far keys' log-sum-exp (`windowed.head_offsets`);
            with ``near``. Streaming heads need it.
        out: ``[B, H, Dv]`` to write to.
        return_lse: also return the log-sum-exp of each cluster; without ``near``.
        most_keys: bound of ``lengths`` that the context's splits are chosen for; None for what
            the block table can hold.

    Returns:
        ``out [B, H, Dv]`` and ``lse [B, k]`` float32 or None.

    Raises:
        AttentionInputError: shapes or options that do not fit together, with which kernels would
            read memory that is not theirs; on CUDA, a dtype or head size without a kernel, or
            strided head dimensions.
    """
    _check(
        query, key_pages, value_pages, block_table, membership, lengths, rows, near, offset, out,
        return_lse,
    )  # fmt: skip
    options: dict[str, Any] = {"lengths": lengths, "scale": scale, "softcap": softcap}
    if query.device.type == "cuda":
        from chai_attention.ops.triton import launch_decode

        return launch_decode.paged_decode(
            query, key_pages, value_pages, block_table, membership, rows=rows, near=near,
            offset=offset, out=out, return_lse=return_lse, most_keys=most_keys, **options,
        )  # fmt: skip
    member = rows_of(membership, rows, query.shape[0])
    size = int(lengths.max()) if len(lengths) else 0
    used = block_table[:, : -(-size // key_pages.shape[1])]
    key, value = (gather_pages(x, used, query.dtype)[:, :, :size] for x in (key_pages, value_pages))
    lse = None
    if near is not None:
        result = reference_paged_decode(query, key, value, member, near, offset=offset, **options)
    else:
        if query.shape[1] != member.clusters:
            index = member.slot_heads[:, :, None].expand(-1, -1, query.shape[2])
            query = query.gather(1, index)
        value = hide_spare(value, lengths)
        result, lse = reference.attention(
            query[:, :, None], hide_spare(key, lengths), value, member, return_lse=return_lse,
            **options,
        )  # fmt: skip
        result = result[:, 0]
        lse = None if lse is None else lse[:, :, 0]
    return (result if out is None else out.copy_(result)), lse


def _check(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    membership: Membership,
    lengths: Tensor,
    rows: Tensor | None,
    near: NearPages | None,
    offset: Tensor | None,
    out: Tensor | None,
    return_lse: bool,
) -> None:
    """Refuse what `paged_decode` cannot take; nothing is read on the host."""
    heads, kept, groups = membership.heads, membership.kept_keys, membership.kv_heads
    values = membership.kept_values
    batch, count, dim = query.shape
    pages, page, value_dim = *key_pages.shape[:2], value_pages.shape[-1]
    if count not in (heads, membership.clusters):
        raise AttentionInputError(
            f"a query of {count} heads is neither of all {heads} nor of the "
            f"{membership.clusters} representatives"
        )
    if near is not None and (return_lse or count != heads):
        raise AttentionInputError(
            "a recent window needs the query of all heads, and has no log-sum-exp"
        )
    if near is None and offset is not None:
        raise AttentionInputError("offset belongs to a recent window: give near, too")
    if membership.streaming and (near is None or offset is None):
        raise AttentionInputError(
            "streaming heads need near and offset: a recent window, and `head_offsets`"
        )
    if rows is None and membership.batch not in (1, batch):
        raise AttentionInputError(f"{membership.batch} memberships for {batch} sequences need rows")
    wanted = {
        "key_pages": (key_pages, (pages, page, kept, dim)),
        "value_pages": (value_pages, (pages, page, values, value_dim)),
        "block_table": (block_table, (batch, *block_table.shape[1:2])),
        "lengths": (lengths, (batch,)),
        "rows": (rows, (batch,)),
        "offset": (offset, (batch, heads)),
        "out": (out, (batch, heads, value_dim)),
    }
    if near is not None:
        count, size = near.key.shape[:2]
        wanted["near.key"] = (near.key, (count, size, groups - kept, dim))
        wanted["near.value"] = (near.value, (count, size, groups - values, value_dim))
        wanted["near.block_table"] = (near.block_table, (batch, *near.block_table.shape[1:2]))
        if {near.key.dtype, near.value.dtype} != {key_pages.dtype} or near.recent < 1:
            raise AttentionInputError(
                f"near pages of {near.key.dtype} beside far ones of {key_pages.dtype}, which need "
                f"one dtype, or a window of {near.recent} tokens"
            )
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise AttentionInputError(
                f"{name} has shape {list(tensor.shape)}, needed is {list(shape)}"
            )
        if tensor is not None and tensor.device != query.device:
            raise AttentionInputError(
                f"{name} is on {tensor.device} and query on {query.device}: move it there first"
            )


def rows_of(membership: Membership, rows: Tensor | None, batch: int) -> Membership:
    """The membership of each of ``batch`` sequences."""
    if rows is not None:
        return membership.select(rows.long())
    return membership if membership.batch == batch else membership.expand(batch)


def gather_pages(pages: Tensor, block_table: Tensor, dtype: torch.dtype) -> Tensor:
    """``[P, N, heads, D]`` of ``[B, max_pages]`` pages: ``[B, heads, max_pages * N, D]``."""
    if not pages.shape[2]:  # all heads stream: there need not be any page
        size = block_table.shape[1] * pages.shape[1]
        return pages.new_zeros(len(block_table), 0, size, pages.shape[3]).to(dtype)
    return pages[block_table.long()].flatten(1, 2).transpose(1, 2).to(dtype)


def hide_spare(states: Tensor, lengths: Tensor) -> Tensor:
    """Zeros in place of what stands behind each sequence's end, which may be anything."""
    spare = torch.arange(states.shape[2], device=states.device) >= lengths[:, None]
    return states.masked_fill(spare[:, None, :, None], 0.0)
