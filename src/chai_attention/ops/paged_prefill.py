"""Prefill of packed sequences, with their context in pages or without any.

Servers pack the new tokens of all sequences of a step into one tensor. A long prompt comes in
chunks, each of which attends to what stands in the cache already. With an exact window (`windowed`)
every head's own scores count for the last w keys and the first s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops import packed
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.paged import rows_of


class Probe(NamedTuple):
    """Tokens that attend with every head's own scores: those of the probe window and before.

    They stand at the start of sequences that have no context. Paper, 3.3: clusters are found in
    the first tokens' scores and used from then on.

    Attributes:
        query: ``[T, H, D]``, all heads, packed like the clustered queries.
        key: ``[T, G, D]``, in the natural order of K/V heads.
        value: ``[T, G, Dv]``, the same.
        end: first position that uses clusters.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    end: int


def paged_prefill(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    membership: Membership,
    *,
    query_starts: Tensor,
    lengths: Tensor,
    most_queries: int,
    scale: float,
    softcap: float | None = None,
    rows: Tensor | None = None,
    probe: Probe | None = None,
    near: NearPages | None = None,
    offset: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention of packed queries to keys in pages, those of new tokens included.

    Query i of Q in sequence b stands at position ``lengths[b] - Q + i``. On CUDA nothing is read
    on the host.

    Args:
        query: ``[T, k, D]`` of the representatives in slot order, or ``[T, H, D]`` of all heads in
            theirs, of which the representatives' are read in place.
        key_pages: ``[P, N, kept_keys, D]`` in the order of ``membership.key_heads``; any strides
            but the last; N a multiple of 16; of the query's dtype or float8_e4m3fn.
        value_pages: ``[P, N, kept_values, Dv]`` in the order of ``membership.value_heads``, of the
            same.
        block_table: ``[B, max_pages]`` int32, the pages of each sequence.
        membership: tables of one row for all sequences, of B, or of any number with ``rows``.
        query_starts: ``[B + 1]`` int32, where each sequence's queries begin, and the end.
        lengths: ``[B]`` int32, keys of each sequence, new ones included; 0 gives zeros.
        most_queries: no sequence has more queries.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
        rows: ``[B]`` int32, each sequence's row of the membership's tables.
        probe: tokens with full attention, which need a tensor of all heads; None for none.
        near: exact recent window, of whose keys those of new tokens are written; needs the query of
            all heads. Heads that stream need it.
        offset: ``[B, H]`` float32 added to the far keys' log-sum-exp (`windowed.head_offsets`),
            with ``near``; None for zeros, which is for memberships without streaming heads.
        out: ``[T, H, Dv]`` to write to; what stands behind the last sequence is left as it is.
        return_lse: also return the log-sum-exp of each cluster; without ``near``.

    Returns:
        ``out [T, H, Dv]`` and ``lse [T, k]`` float32 (natural logarithm) or None.

    Raises:
        AttentionInputError: shapes or options that do not fit together.
    """
    _check(query, value_pages.shape[2], membership, query_starts, rows, probe)
    _check_window(
        query, membership, query_starts, 0 if near is None else near.recent, offset, return_lse
    )
    if key_pages.shape[1] % 16 or key_pages.shape[:2] != value_pages.shape[:2]:
        raise AttentionInputError(
            f"pages hold a multiple of 16 tokens, K and V alike, not {key_pages.shape[1]} and "
            f"{value_pages.shape[1]}"
        )
    if near is not None:
        _check_near(near, key_pages, value_pages, membership, query_starts)
    out = _room(query, value_pages, membership) if out is None else out
    if query.device.type == "cuda":
        from chai_attention.ops.triton import paged_prefill as kernels

        lse = kernels.paged_prefill(
            query, key_pages, value_pages, block_table, membership, out,
            query_starts=query_starts, lengths=lengths, most_queries=most_queries, scale=scale,
            softcap=softcap, rows=rows, probe=probe, near=near, offset=offset,
            return_lse=return_lse,
        )  # fmt: skip
        return out, lse
    starts = query_starts.tolist()
    states = packed.paged_states(key_pages, value_pages, block_table, lengths.tolist(), query.dtype)
    window = None
    if near is not None:
        counts = query_starts.diff().tolist()
        members = rows_of(membership, rows, len(counts))
        keys = packed.paged_near(near, states, members, counts)
        window = packed.Window(near.recent, near.sinks, offset, keys)
    lse = packed.attend(
        query, states, membership, out, starts, scale=scale, softcap=softcap, rows=rows,
        probe=probe, window=window, return_lse=return_lse,
    )  # fmt: skip
    return out, lse


def varlen_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    *,
    query_starts: Tensor,
    most_queries: int,
    scale: float,
    softcap: float | None = None,
    rows: Tensor | None = None,
    natural_order: bool = False,
    probe: Probe | None = None,
    recent: int = 0,
    sinks: int = 0,
    offset: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention of packed sequences without context, to their own K and V.

    Args:
        query: ``[T, k or H, D]``, as in `paged_prefill`.
        key: ``[T, kept_keys, D]`` in the order of ``membership.key_heads``; any strides but the
            last.
        value: ``[T, kept_values, Dv]`` in the order of ``membership.value_heads``.
        membership: as in `paged_prefill`.
        query_starts: ``[B + 1]`` int32, where each sequence begins, and the end.
        most_queries: no sequence has more tokens.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
        rows: as in `paged_prefill`.
        natural_order: K and V hold all G heads in their natural order, as projections leave them,
            so that nothing has to be gathered.
        probe: as in `paged_prefill`.
        recent: w of the exact window, which needs ``natural_order`` and the query of all heads; 0
            for none.
        sinks: s, the first tokens that are always near.
        offset: as in `paged_prefill`.
        out: as in `paged_prefill`.
        return_lse: as in `paged_prefill`.

    Returns:
        ``out [T, H, Dv]`` and ``lse [T, k]`` float32 or None.

    Raises:
        AttentionInputError: shapes or options that do not fit together.
    """
    groups = membership.kv_heads
    _check(
        query, value.shape[1], membership, query_starts, rows, probe,
        groups if natural_order else None,
    )  # fmt: skip
    _check_window(query, membership, query_starts, recent, offset, return_lse)
    if recent and not natural_order:
        raise AttentionInputError("a recent window needs K and V of all heads in natural order")
    kept = groups if natural_order else membership.kept_keys
    if key.shape[1] != kept:
        raise AttentionInputError(f"K has {key.shape[1]} heads, not {kept}")
    out = _room(query, value, membership) if out is None else out
    if query.device.type == "cuda":
        from chai_attention.ops.triton import paged_prefill as kernels

        lse = kernels.varlen_prefill(
            query, key, value, membership, out,
            query_starts=query_starts, most_queries=most_queries, scale=scale, softcap=softcap,
            rows=rows, natural_order=natural_order, probe=probe, recent=recent, sinks=sinks,
            offset=offset, return_lse=return_lse,
        )  # fmt: skip
        return out, lse
    starts = query_starts.tolist()
    members = rows_of(membership, rows, len(starts) - 1) if natural_order else None
    states = packed.packed_states(key, value, starts, members)
    window = None
    if recent:
        window = packed.Window(recent, sinks, offset, packed.packed_near(key, value, starts, sinks))
    lse = packed.attend(
        query, states, membership, out, starts, scale=scale, softcap=softcap, rows=rows,
        probe=probe, window=window, return_lse=return_lse,
    )  # fmt: skip
    return out, lse


def _room(query: Tensor, value: Tensor, membership: Membership) -> Tensor:
    shape = (query.shape[0], membership.heads, value.shape[-1])
    return torch.empty(shape, dtype=query.dtype, device=query.device)


def _check(
    query: Tensor,
    values: int,
    membership: Membership,
    query_starts: Tensor,
    rows: Tensor | None,
    probe: Probe | None,
    value_heads: int | None = None,
) -> None:
    """Refuse what does not fit together; V has ``value_heads``, None for those that are kept."""
    heads, batch = membership.heads, query_starts.shape[0] - 1
    value_heads = membership.kept_values if value_heads is None else value_heads
    if query.shape[1] not in (heads, membership.clusters):
        raise AttentionInputError(
            f"a query of {query.shape[1]} heads is neither of all {heads} nor of the "
            f"{membership.clusters} representatives"
        )
    if values != value_heads:
        raise AttentionInputError(f"V has {values} heads, not {value_heads}")
    if rows is None and membership.batch not in (1, batch):
        raise AttentionInputError(f"{membership.batch} memberships for {batch} sequences need rows")
    if probe is not None:
        want = (heads, membership.kv_heads, membership.kv_heads)
        if tuple(x.shape[1] for x in probe[:3]) != want or probe.end < 1:
            raise AttentionInputError(
                f"a probe needs {want[0]} heads of Q, {want[1]} of K and V, and an end of at least "
                "1 token"
            )


def _check_window(
    query: Tensor,
    membership: Membership,
    query_starts: Tensor,
    recent: int,
    offset: Tensor | None,
    return_lse: bool,
) -> None:
    """Refuse what does not fit an exact window of ``recent`` tokens, or its absence."""
    heads, batch = membership.heads, query_starts.shape[0] - 1
    if not recent:
        if membership.streaming:
            raise AttentionInputError("heads that stream need a recent window")
        if offset is not None:
            raise AttentionInputError("offset belongs to a recent window")
        return
    if return_lse or query.shape[1] != heads:
        raise AttentionInputError(
            "a recent window needs the query of all heads, and has no log-sum-exp"
        )
    if offset is None and membership.streaming:
        raise AttentionInputError("heads that stream need an offset: windowed.head_offsets")
    if offset is not None and offset.shape != (batch, heads):
        raise AttentionInputError(
            f"offset has shape {list(offset.shape)}, needed is {[batch, heads]}"
        )


def _check_near(
    near: NearPages,
    key_pages: Tensor,
    value_pages: Tensor,
    membership: Membership,
    query_starts: Tensor,
) -> None:
    """Refuse near pages that are not those of the far ones."""
    removed = membership.kv_heads - membership.kept_keys
    streaming = membership.kv_heads - membership.kept_values
    pages = near.key.shape[:2]
    wanted = {
        "key": (near.key, (*pages, removed, key_pages.shape[3])),
        "value": (near.value, (*pages, streaming, value_pages.shape[3])),
        "block_table": (near.block_table, (query_starts.shape[0] - 1, near.block_table.shape[1])),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise AttentionInputError(
                f"near.{name} has shape {list(tensor.shape)}, needed is {list(shape)}"
            )
    if near.key.dtype != key_pages.dtype:
        raise AttentionInputError(
            f"near pages are of {near.key.dtype} and far ones of {key_pages.dtype}"
        )
