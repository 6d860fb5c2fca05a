"""Prefill of packed sequences, with their context in pages or without any.

Servers pack the new tokens of all sequences of a step into one tensor. A long prompt comes in
chunks, each of which attends to what stands in the cache already.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from chai_attention.errors import AttentionInputError
from chai_attention.membership import Membership
from chai_attention.ops import reference
from chai_attention.ops.paged import gather_pages, hide_spare, rows_of


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
        value_pages: ``[P, N, G, Dv]`` in the order of ``membership.value_heads``, of the same.
        block_table: ``[B, max_pages]`` int32, the pages of each sequence.
        membership: tables of one row for all sequences, of B, or of any number with ``rows``.
        query_starts: ``[B + 1]`` int32, where each sequence's queries begin, and the end.
        lengths: ``[B]`` int32, keys of each sequence, new ones included; 0 gives zeros.
        most_queries: no sequence has more queries.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
        rows: ``[B]`` int32, each sequence's row of the membership's tables.
        probe: tokens with full attention, which need a tensor of all heads; None for none.
        out: ``[T, H, Dv]`` to write to; what stands behind the last sequence is left as it is.
        return_lse: also return the log-sum-exp of each cluster.

    Returns:
        ``out [T, H, Dv]`` and ``lse [T, k]`` float32 (natural logarithm) or None.

    Raises:
        AttentionInputError: shapes or options that do not fit together.
    """
    _check(query, value_pages.shape[2], membership, query_starts, rows, probe)
    if key_pages.shape[1] % 16 or key_pages.shape[:2] != value_pages.shape[:2]:
        raise AttentionInputError(
            f"pages hold a multiple of 16 tokens, K and V alike, not {key_pages.shape[1]} and "
            f"{value_pages.shape[1]}"
        )
    out = _room(query, value_pages, membership) if out is None else out
    if query.device.type == "cuda":
        from chai_attention.ops.triton import paged_prefill as kernels

        lse = kernels.paged_prefill(
            query, key_pages, value_pages, block_table, membership, out,
            query_starts=query_starts, lengths=lengths, most_queries=most_queries, scale=scale,
            softcap=softcap, rows=rows, probe=probe, return_lse=return_lse,
        )  # fmt: skip
        return out, lse
    keys, values = (
        hide_spare(gather_pages(x, block_table, query.dtype), lengths)
        for x in (key_pages, value_pages)
    )
    states = [(k[:, :n], v[:, :n]) for k, v, n in zip(keys, values, lengths.tolist(), strict=True)]
    lse = _each(
        query, states, membership, out, query_starts.tolist(), scale=scale, softcap=softcap,
        rows=rows, probe=probe, return_lse=return_lse,
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
    out: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal clustered attention of packed sequences without context, to their own K and V.

    Args:
        query: ``[T, k or H, D]``, as in `paged_prefill`.
        key: ``[T, kept_keys, D]`` in the order of ``membership.key_heads``; any strides but the
            last.
        value: ``[T, G, Dv]`` in the order of ``membership.value_heads``.
        membership: as in `paged_prefill`.
        query_starts: ``[B + 1]`` int32, where each sequence begins, and the end.
        most_queries: no sequence has more tokens.
        scale: factor on the scores.
        softcap: as in `ops.reference.attention`.
        rows: as in `paged_prefill`.
        natural_order: K and V hold all G heads in their natural order, as projections leave them,
            so that nothing has to be gathered.
        probe: as in `paged_prefill`.
        out: as in `paged_prefill`.
        return_lse: as in `paged_prefill`.

    Returns:
        ``out [T, H, Dv]`` and ``lse [T, k]`` float32 or None.

    Raises:
        AttentionInputError: shapes or options that do not fit together.
    """
    _check(query, value.shape[1], membership, query_starts, rows, probe)
    kept = membership.kv_heads if natural_order else membership.kept_keys
    if key.shape[1] != kept:
        raise AttentionInputError(f"K has {key.shape[1]} heads, not {kept}")
    out = _room(query, value, membership) if out is None else out
    if query.device.type == "cuda":
        from chai_attention.ops.triton import paged_prefill as kernels

        lse = kernels.varlen_prefill(
            query, key, value, membership, out,
            query_starts=query_starts, most_queries=most_queries, scale=scale, softcap=softcap,
            rows=rows, natural_order=natural_order, probe=probe, return_lse=return_lse,
        )  # fmt: skip
        return out, lse
    starts = query_starts.tolist()
    member = rows_of(membership, rows, len(starts) - 1)
    states = []
    for b, (start, stop) in enumerate(pairwise(starts)):
        k, v = key[start:stop].transpose(0, 1), value[start:stop].transpose(0, 1)
        if natural_order:
            k, v = k[member.key_heads[b]], v[member.value_heads[b]]
        states.append((k, v))
    lse = _each(
        query, states, membership, out, starts, scale=scale, softcap=softcap, rows=rows,
        probe=probe, return_lse=return_lse,
    )  # fmt: skip
    return out, lse


def _each(
    query: Tensor,
    states: list[tuple[Tensor, Tensor]],
    membership: Membership,
    out: Tensor,
    starts: list[int],
    *,
    scale: float,
    softcap: float | None,
    rows: Tensor | None,
    probe: Probe | None,
    return_lse: bool,
) -> Tensor | None:
    """Write ``out`` sequence by sequence from K and V ``[heads, S, D]`` of each; return the lse."""
    members = rows_of(membership, rows, len(states))
    lse = query.new_empty(query.shape[0], membership.clusters, dtype=torch.float32)
    for b, (key, value) in enumerate(states):
        tokens = slice(starts[b], starts[b + 1])
        if tokens.start == tokens.stop:
            continue
        member = members.select(torch.tensor([b], device=query.device))
        part = query[tokens]
        if query.shape[1] != member.clusters:
            part = part[:, member.slot_heads[0]]
        result, part_lse = reference.attention(
            part.transpose(0, 1)[None], key[None], value[None], member, scale=scale,
            softcap=softcap, return_lse=return_lse,
        )  # fmt: skip
        out[tokens] = result[0]
        if part_lse is not None:
            lse[tokens] = part_lse[0].T
        if probe is not None and key.shape[1] == tokens.stop - tokens.start:
            first = slice(tokens.start, min(tokens.stop, tokens.start + probe.end))
            own = Membership.identity(member.heads, member.kv_heads, device=query.device)
            q, k, v = (x[first].transpose(0, 1)[None] for x in probe[:3])
            exact, _ = reference.attention(q, k, v, own, scale=scale, softcap=softcap)
            out[first] = exact[0]
    return lse if return_lse else None


def _room(query: Tensor, value: Tensor, membership: Membership) -> Tensor:
    shape = (query.shape[0], membership.heads, value.shape[-1])
    return torch.empty(shape, dtype=query.dtype, device=query.device)


def _check(
    query: Tensor,
    groups: int,
    membership: Membership,
    query_starts: Tensor,
    rows: Tensor | None,
    probe: Probe | None,
) -> None:
    """Refuse what does not fit together."""
    heads, batch = membership.heads, query_starts.shape[0] - 1
    if query.shape[1] not in (heads, membership.clusters):
        raise AttentionInputError(
            f"a query of {query.shape[1]} heads is neither of all {heads} nor of the "
            f"{membership.clusters} representatives"
        )
    if groups != membership.kv_heads:
        raise AttentionInputError(f"V has {groups} heads, not {membership.kv_heads}")
    if rows is None and membership.batch not in (1, batch):
        raise AttentionInputError(f"{membership.batch} memberships for {batch} sequences need rows")
    if probe is not None:
        want = (heads, membership.kv_heads, membership.kv_heads)
        if tuple(x.shape[1] for x in probe[:3]) != want or probe.end < 1:
            raise AttentionInputError(
                f"a probe needs {want[0]} heads of Q, {want[1]} of K and V, and an end of at least "
                "1 token"
            )
