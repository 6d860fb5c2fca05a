"""Checks of arguments, because with wrong ones kernels would read memory that is not theirs.

Nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops.call import AttentionCall, DenseKV, PackedKV, PackedQueries, PagedKV, Probe

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Wanted = Mapping[str, tuple[Tensor | None, tuple[int, ...]]]


def check_shapes(wanted: Wanted, device: torch.device) -> None:
    """Refuse a tensor of another shape, or on another device than the query."""
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise AttentionInputError(
                f"{name} has shape {list(tensor.shape)}, needed is {list(shape)}"
            )
        if tensor.device != device:
            raise AttentionInputError(
                f"{name} is on {tensor.device} and query on {device}: move it there first"
            )


def check_dense(query: Tensor, kv: DenseKV, membership: Membership) -> None:
    """Refuse what `dispatch.attention` cannot take."""
    key, value = kv.key, kv.value
    if not (query.dtype == key.dtype == value.dtype) or query.dtype not in DTYPES:
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (query, key, value))
        raise AttentionInputError(
            f"query, key and value need one dtype, float32, bfloat16, float16 or float64, "
            f"not {dtypes}"
        )
    if not query.ndim == key.ndim == value.ndim == 4:
        raise AttentionInputError("query, key and value need four dimensions: [B, heads, S, D]")
    batch, size = query.shape[0], key.shape[2]
    wanted: Wanted = {
        "query": (query, (batch, membership.clusters, query.shape[2], query.shape[3])),
        "key": (key, (batch, membership.kept_keys, size, query.shape[3])),
        "value": (value, (batch, membership.kv_heads, size, value.shape[3])),
        "representatives": (membership.representatives, (batch, membership.heads)),
        "lengths": (kv.lengths, (batch,)),
        "valid": (kv.valid, (batch, size)),
    }
    check_shapes(wanted, query.device)


def check_paged_decode(
    query: Tensor, pages: PagedKV, call: AttentionCall, out: Tensor | None
) -> None:
    """Refuse what `dispatch.paged_decode` cannot take."""
    member, local, offset = call.membership, pages.window, call.offset
    batch, count, dim = query.shape
    _check_heads(count, batch, call)
    if local is not None and (call.return_lse or count != member.heads):
        raise AttentionInputError(
            "a recent window needs the query of all heads, and has no log-sum-exp"
        )
    if local is None and offset is not None:
        raise AttentionInputError("offset belongs to a recent window: give pages of a window, too")
    if member.streaming and (local is None or offset is None):
        raise AttentionInputError(
            "streaming heads need a recent window and an offset: windowed.head_offsets"
        )
    page, value_dim = pages.key.shape[:2], pages.value.shape[-1]
    wanted: Wanted = {
        "key_pages": (pages.key, (*page, member.kept_keys, dim)),
        "value_pages": (pages.value, (*page, member.kept_values, value_dim)),
        "block_table": (pages.block_table, (batch, *pages.block_table.shape[1:2])),
        "seq_lens": (pages.seq_lens, (batch,)),
        "membership_ids": (call.membership_ids, (batch,)),
        "offset": (offset, (batch, member.heads)),
        "out": (out, (batch, member.heads, value_dim)),
    }
    check_shapes(wanted, query.device)
    _check_local_pages(pages, member, batch, query.device)


def check_paged_prefill(
    queries: PackedQueries, pages: PagedKV, call: AttentionCall, probe: Probe | None
) -> None:
    """Refuse what `dispatch.paged_prefill` cannot take."""
    local = pages.window
    _check_packed(queries, pages.value.shape[2], call.membership.kept_values, call, probe)
    _check_window(queries, 0 if local is None else local.recent, call)
    if pages.key.shape[1] % 16 or pages.key.shape[:2] != pages.value.shape[:2]:
        raise AttentionInputError(
            f"pages hold a multiple of 16 tokens, K and V alike, not {pages.key.shape[1]} and "
            f"{pages.value.shape[1]}"
        )
    _check_local_pages(
        pages, call.membership, queries.query_start_loc.shape[0] - 1, queries.query.device
    )


def check_varlen_prefill(
    queries: PackedQueries, packed: PackedKV, call: AttentionCall, probe: Probe | None
) -> None:
    """Refuse what `dispatch.varlen_prefill` cannot take."""
    member = call.membership
    kept, values = member.kept_keys, member.kept_values
    if packed.natural_order:
        kept = values = member.kv_heads
    _check_packed(queries, packed.value.shape[1], values, call, probe)
    _check_window(queries, packed.recent, call)
    if packed.recent and not packed.natural_order:
        raise AttentionInputError("a recent window needs K and V of all heads in natural order")
    if packed.key.shape[1] != kept:
        raise AttentionInputError(f"K has {packed.key.shape[1]} heads, not {kept}")


def _check_heads(count: int, batch: int, call: AttentionCall) -> None:
    """Refuse a query of other heads, or memberships that are not those of the sequences."""
    member = call.membership
    if count not in (member.heads, member.clusters):
        raise AttentionInputError(
            f"a query of {count} heads is neither of all {member.heads} nor of the "
            f"{member.clusters} representatives"
        )
    if call.membership_ids is None and member.batch not in (1, batch):
        raise AttentionInputError(
            f"{member.batch} memberships for {batch} sequences need membership_ids"
        )


def _check_local_pages(
    pages: PagedKV, member: Membership, batch: int, device: torch.device
) -> None:
    """Refuse local pages that are not those of the far ones."""
    local = pages.window
    if local is None:
        return
    table, known = local.block_table, pages.shared
    check_shapes({"window.block_table": (table, (batch, *table.shape[1:2]))}, device)
    if known is not None and known.get(_check_local_pages) is member:
        return  # the same pages as before
    page, groups = local.key.shape[:2], member.kv_heads
    wanted: Wanted = {
        "window.key": (local.key, (*page, groups - member.kept_keys, pages.key.shape[3])),
        "window.value": (local.value, (*page, groups - member.kept_values, pages.value.shape[3])),
    }
    check_shapes(wanted, device)
    if {local.key.dtype, local.value.dtype} != {pages.key.dtype} or local.recent < 1:
        raise AttentionInputError(
            f"local pages are of {local.key.dtype} and far ones of {pages.key.dtype}, which need "
            f"one dtype, or a window of {local.recent} tokens"
        )
    if known is not None:
        known[_check_local_pages] = member


def _check_packed(
    queries: PackedQueries, values: int, wanted: int, call: AttentionCall, probe: Probe | None
) -> None:
    """Refuse what does not fit together; V has ``values`` heads and ``wanted`` are needed."""
    member, batch = call.membership, queries.query_start_loc.shape[0] - 1
    _check_heads(queries.query.shape[1], batch, call)
    if values != wanted:
        raise AttentionInputError(f"V has {values} heads, not {wanted}")
    if probe is not None:
        want = (member.heads, member.kv_heads, member.kv_heads)
        if tuple(x.shape[1] for x in probe[:3]) != want or probe.end < 1:
            raise AttentionInputError(
                f"a probe needs {want[0]} heads of Q, {want[1]} of K and V, and an end of at least "
                "1 token"
            )


def _check_window(queries: PackedQueries, recent: int, call: AttentionCall) -> None:
    """Refuse what does not fit an exact window of ``recent`` tokens, or its absence."""
    member, offset = call.membership, call.offset
    if not recent:
        if member.streaming:
            raise AttentionInputError("heads that stream need a recent window")
        if offset is not None:
            raise AttentionInputError("offset belongs to a recent window")
        return
    if call.return_lse or queries.query.shape[1] != member.heads:
        raise AttentionInputError(
            "a recent window needs the query of all heads, and has no log-sum-exp"
        )
    if offset is None and member.streaming:
        raise AttentionInputError("heads that stream need an offset: windowed.head_offsets")
    shape = (queries.query_start_loc.shape[0] - 1, member.heads)
    check_shapes({"offset": (offset, shape)}, queries.query.device)
