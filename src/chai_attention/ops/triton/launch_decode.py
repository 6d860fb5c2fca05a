"""Chooses the decode kernel's tiles and its splits of the context."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from chai_attention.membership import Membership
from chai_attention.ops.narrow import FLOAT8
from chai_attention.ops.near_pages import NearPages
from chai_attention.ops.ring import NearRing
from chai_attention.ops.triton import launch_hopper_decode
from chai_attention.ops.triton.checks import check
from chai_attention.ops.triton.chunks import chunks_of, members_of
from chai_attention.ops.triton.decode import padded
from chai_attention.ops.triton.device import capability, processors
from chai_attention.ops.triton.sizes import cdiv, power_of_2
from chai_attention.ops.triton.split_decode import decode

logger = logging.getLogger("chai_attention")

# measured on an H100 and an H200: numbers of V per key and bytes per block of keys a program holds,
# and how many programs a processor runs at a time, by the numbers per key (of 16 bits)
COLUMNS = 1024
TILE_BYTES = 2 * 16384
RESIDENT = {1024: 3, 256: 4, 0: 6}
RESIDENT_SMALL_PAGES = {256: 3, 0: 6}  # where a block of keys lies in several pages
RESIDENT_8_BITS = {512: 2, 0: 3}
REGISTERS = 65536  # of a processor
MIN_KEYS_PER_SPLIT = 64
MAX_SPLITS = 128
MAX_WAVES = 8
# the Hopper kernel. Where K is read once for this many V heads, the other is as fast in full
# batches (14 x 8,192, 4 clusters: 353 us against 365 on an H100, 245 against 248 on an H200) and
# slower in small ones (1 x 2,048: 10.8 us against 8.8 on an H100)
HOPPER_MEMBERS = 8
# a single program on nearly each processor reads about as fast as two, with half as many parts
# (1 x 32,768, default recipe, H200: 65 us against 69)
FULL_ENOUGH = 0.9
# but not where heads share V, much of which then comes from the L2 cache: there more parts are
# faster (16 x 8,192, 8 K/V heads, H200: 157 us with 8 parts, 181 us with 2)
GROUPED_SPLITS = 8
MERGE_PROGRAMS = 256  # fewer leave processors idle while the splits are read


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    *,
    scale: float,
    lengths: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`ops.reference.attention` for a single query per sequence."""
    check(query, key, value)
    lse = _lse(membership, query) if return_lse else None
    out = _run(
        query[:, :, 0], key, value, membership, lse, key.shape[2],
        scale=scale, lengths=lengths, valid=valid, softcap=softcap,
    )  # fmt: skip
    return out[:, None], None if lse is None else lse[:, :, None]


def decode_recent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    near: NearRing,
    *,
    lengths: Tensor | None = None,
    scale: float,
    offset: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`ops.ring.decode_recent` in two launches."""
    check(query, key, value, *(memory for pair in near.memories for memory in pair))
    out = _run(
        query[:, :, 0], key, value, membership, None, key.shape[2],
        scale=scale, lengths=lengths, valid=valid, softcap=softcap, near=near, offset=offset,
    )  # fmt: skip
    return out[:, None]


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
    """`ops.paged.paged_decode` in two launches."""
    own = () if near is None else (near.key, near.value)
    check(query, pages=(key_pages, value_pages, *own))
    lse = _lse(membership, query) if return_lse else None
    size = most_keys or block_table.shape[1] * key_pages.shape[1]
    result = _run(
        query, key_pages, value_pages, membership, lse, size, out=out, scale=scale,
        lengths=lengths, softcap=softcap, table=block_table, rows=rows, near=near, offset=offset,
    )  # fmt: skip
    return result, lse


def _lse(membership: Membership, query: Tensor) -> Tensor:
    shape = (query.shape[0], membership.clusters)
    return torch.empty(shape, dtype=torch.float32, device=query.device)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    membership: Membership,
    lse: Tensor | None,
    size: int,
    *,
    out: Tensor | None = None,
    near: NearPages | NearRing | None = None,
    **options: Any,
) -> Tensor:
    """Choose tiles for ``size`` keys and launch; ``[B, H, Dv]``."""
    batch, _, dim = query.shape
    heads, clusters = membership.heads, membership.clusters
    if out is None:
        shape = (batch, heads, value.shape[3])
        out = torch.empty(shape, dtype=query.dtype, device=query.device)
    wide = padded(max(dim, value.shape[3]))
    far_heads = len(membership.far_heads)
    members = members_of(far_heads, clusters, COLUMNS // wide)
    chunks = chunks_of(membership, members)
    columns = members * wide
    # of chunks known on the device only, as many as clusters of equal size have
    used = chunks.count - chunks.streaming
    used = used if chunks.exact else max(clusters, cdiv(far_heads, members))
    programs = batch * max(1, used)
    grouped = membership.group_size > 1
    is_narrow, warps = value.dtype == FLOAT8, 4 if columns > 128 else 2
    block = max(8, min(64, TILE_BYTES // (columns * value.element_size())))
    small_pages = options.get("table") is not None and key.shape[1] % block != 0
    resident = RESIDENT_SMALL_PAGES if small_pages else RESIDENT_8_BITS if is_narrow else RESIDENT
    width = columns * max(2, value.element_size()) // 2
    at_a_time = next(count for least, count in resident.items() if width >= least)
    slots = processors(query.device)
    tensor_cores = (
        chunks.count > chunks.streaming  # else all heads stream: near keys only
        and launch_hopper_decode.fits(query, key, value, options.get("table"))
        and (members < HOPPER_MEMBERS or programs <= slots // 4)
    )
    if tensor_cores:
        at_a_time = launch_hopper_decode.RESIDENT
        alone = slots // programs
        if chunks.exact and alone > 1 and programs * alone >= FULL_ENOUGH * slots and not grouped:
            at_a_time = 1
    splits = splits_of(programs, at_a_time, size, query.device)
    if tensor_cores and grouped:
        splits = max(splits, min(GROUPED_SPLITS, cdiv(size, MIN_KEYS_PER_SPLIT)))
    merging = max(1, MERGE_PROGRAMS // (batch * heads))
    logger.debug(
        "decode kernel%s%s%s: %d members a program, %d splits",
        ", paged" if options.get("table") is not None else "",
        ", recent window" if near is not None else "",
        ", Hopper" if tensor_cores else "",
        members,
        splits,
    )
    decode(
        query, key, value, chunks, out, lse,
        clusters=clusters, kv_heads=membership.kv_heads, near=near,
        key_place=None if near is None else membership.key_place,
        splits=splits,
        block=block,
        warps=warps,
        # else the compiler may take more, and fewer programs run at a time than were planned for
        registers=min(255, REGISTERS // (at_a_time * warps * 32) // 8 * 8),
        # wide loads of small pages wait for the block table: they are not worth running ahead
        stages=1 if small_pages and columns >= COLUMNS and key.shape[1] <= 16 else 2,
        # keys of different warps: with half the bytes to wait for, adding them up in every block
        # would be most of the time; in 16 bits it costs nothing that could be measured
        lines=max(1, warps * 32 * 16 // columns) if is_narrow else 1,
        early=capability(query.device) >= (9, 0),
        merge_columns=max(16, wide // power_of_2(merging)) if merging > 1 else None,
        tensor_cores=tensor_cores,
        **options,
    )  # fmt: skip
    return out


def splits_of(programs: int, resident: int, size: int, device: torch.device) -> int:
    """How many parts the context is cut into, so that programs fill whole waves of processors.

    ``programs`` is an estimate: how many chunks of full clusters there are; ``resident`` of them
    run on a processor at a time. A wave of all processors that is only begun costs as much time
    as a full one.
    """
    slots = processors(device) * resident
    most = min(MAX_SPLITS, cdiv(size, MIN_KEYS_PER_SPLIT))
    best, best_share = 1, 0.0
    for waves in range(1, MAX_WAVES + 1):
        splits = min(slots * waves // programs, most)
        share = programs * splits / (cdiv(programs * splits, slots) * slots) if splits else 0
        if share > best_share:
            best, best_share = splits, share
        if share > 0.95:
            break
    return best
